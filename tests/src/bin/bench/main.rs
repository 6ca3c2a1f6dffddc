//! `cargo xtask bench`: what Sheave costs, measured side by side with what it is compared to. Everything is checked before
//! it is timed: nothing fast but wrong gets a figure.

mod agent;
mod controller;
mod effort;
mod findings;
mod goal;
mod html;
mod machine;
mod path;
mod program;
mod progress;
mod statistics;
mod svg;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use effort::Effort;
use findings::Findings;
use machine::Precedence;
use progress::Progress;

/// Measures what Sheave costs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Fewer and shorter samples: over in three minutes
    #[arg(long)]
    quick: bool,
    /// Only measures whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Say what would be measured, and how long that takes
    #[arg(long)]
    list: bool,
    /// Rounds, in place of the run's own number
    #[arg(long)]
    rounds: Option<u32>,
    /// Where the results go for machines
    #[arg(long, default_value = "target/bench/bench.json")]
    json: PathBuf,
    /// Where the report for people goes
    #[arg(long, default_value = "target/bench/report.html")]
    html: PathBuf,
    /// Compare with a saved run
    #[arg(long)]
    against: Option<PathBuf>,
}

/// What the measuring process starts itself.
#[derive(Debug, Subcommand)]
enum Part {
    /// A client
    #[command(hide = true)]
    Traffic(path::traffic::Arguments),
}

/// A quick run is over by then.
const QUICK: Duration = Duration::from_secs(180);

/// One thing to measure.
struct Measure {
    name: &'static str,
    /// How long it takes: in a quick run, in a full one.
    seconds: [u64; 2],
    run: fn(&Effort, &mut Findings, &Progress) -> Result<()>,
}

/// All of them, in order.
const MEASURES: &[Measure] = &[
    Measure { name: "program-hot", seconds: [20, 120], run: program::hot },
    Measure { name: "program-rotating", seconds: [8, 100], run: program::rotating },
    Measure { name: "xdp-live", seconds: [5, 10], run: program::live_frames },
    Measure { name: "ways", seconds: [35, 270], run: path::ways },
    Measure { name: "nodeport", seconds: [15, 110], run: path::node_port },
    Measure { name: "services", seconds: [14, 330], run: path::against_services },
    Measure { name: "sync", seconds: [14, 80], run: controller::sync },
    Measure { name: "changes", seconds: [15, 60], run: controller::changes },
    Measure { name: "agent", seconds: [23, 60], run: agent::measure },
    Measure { name: "memory", seconds: [12, 30], run: agent::memory },
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(Part::Traffic(arguments)) = &arguments.part {
        return path::traffic::run(arguments);
    }
    let mut effort = Effort::new(arguments.quick);
    effort.rounds = arguments.rounds.unwrap_or(effort.rounds);
    effort.path_rounds = arguments.rounds.unwrap_or(effort.path_rounds);
    let only = arguments.only.as_deref().unwrap_or_default();
    let measures: Vec<&Measure> = MEASURES.iter().filter(|measure| measure.name.contains(only)).collect();
    ensure!(!measures.is_empty(), "no measure's name contains {only:?}");
    let length = measures.iter().map(|measure| measure.length(&effort)).sum::<Duration>();
    for measure in measures.iter().filter(|_| arguments.list) {
        println!("{:20} {:>4} s", measure.name, measure.length(&effort).as_secs());
    }
    if arguments.list {
        return Ok(());
    }
    let before = arguments.against.as_deref().map(Findings::load).transpose()?;
    eprintln!(
        "bench: {} measures, {} rounds each: about {} minutes",
        measures.len(),
        effort.rounds,
        length.as_secs().div_ceil(60)
    );
    let _precedence = Precedence::take();
    let mut findings = Findings::new(arguments.quick);
    let (started, progress) = (Instant::now(), Progress::new(length));
    let mut planned = Duration::ZERO;
    for measure in &measures {
        if effort.quick && started.elapsed() + measure.length(&effort) > QUICK {
            progress.say(&format!("bench: {} is left out: on this machine there is no time left for it", measure.name));
            continue;
        }
        progress.begin(measure.name, planned);
        planned += measure.length(&effort);
        let began = Instant::now();
        // One that fails says so in the results; the others are none the worse for it.
        if let Err(error) = (measure.run)(&effort, &mut findings, &progress) {
            progress.say(&format!("bench: {}: {error:#}", measure.name));
            findings.failures.insert(measure.name.into(), format!("{error:#}"));
        }
        progress.say(&format!("bench: {} took {:.0} s", measure.name, began.elapsed().as_secs_f64()));
    }
    progress.finish();
    findings.seconds = started.elapsed().as_secs_f64();
    findings.save(&arguments.json)?;
    findings::write(&arguments.html, &html::page(&findings))?;
    println!("{}", table::text(&findings));
    if let Some(before) = before {
        println!("Against the saved run:\n{}", table::against(&findings, &before));
    }
    let (report, json) = (arguments.html.display(), arguments.json.display());
    println!("{:.0} s. With plots: {report}; for machines: {json}", findings.seconds);
    ensure!(findings.failures.is_empty(), "{} measures failed", findings.failures.len());
    Ok(())
}

impl Measure {
    fn length(&self, effort: &Effort) -> Duration {
        Duration::from_secs(self.seconds[usize::from(!effort.quick)])
    }
}
