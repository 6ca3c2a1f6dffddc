//! `sheave report`: one archive that shows a developer what an operator sees. Nothing in it is secret: no credentials, no
//! contents of kubeconfigs or of the API, no packets' contents. What can't be read is named in it and holds nothing else up.

mod machine;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;

use super::output;
use super::status::{DaemonArgs, Status};
use super::{PinArgs, http, views};

/// Rows of a view: enough to see what is wrong, and not all of a large node's flows.
const ROWS: usize = 10_000;

const README: &str = "\
A report of `sheave report`, for a bug report.

status.txt, status.json   `sheave status`
services.json, ...        `sheave services -o json` and the other views, the first 10 000 rows of each
healthz.json, metrics.txt what the running daemon answers
daemon.txt                its flags, and its SHEAVE_ variables
machine.txt               the kernel, its settings and modules, mounts of BPF and cgroup file systems
kernel-config.txt         how the kernel was built, as far as it matters here
interfaces.txt            network interfaces of this node
errors.txt                what could not be read

It holds names and addresses of your Services, pods and clients, and no credentials. Sheave's log is not in it: add it, too
(`kubectl logs`, or `journalctl`).
";

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the report {}", path.display())]
pub struct ReportError {
    path: PathBuf,
    source: io::Error,
}

/// Flags of `sheave report`.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
    /// The archive, which must not be there yet; `-` is standard output [default: sheave-report-TIME.tar.gz in this folder].
    #[arg(long, env = "SHEAVE_FILE", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// `sheave report`; returns where the archive is, unless that is standard output.
///
/// # Errors
///
/// If the archive can't be written.
pub fn report(args: &ReportArgs) -> Result<Option<PathBuf>, ReportError> {
    let path = args
        .file
        .clone()
        .unwrap_or_else(|| format!("sheave-report-{}.tar.gz", Timestamp::now().strftime("%Y%m%dT%H%M%SZ")).into());
    let files = collect(args);
    let failed = |source| ReportError { path: path.clone(), source };
    if path.as_os_str() == "-" {
        write(io::stdout().lock(), &files).and_then(|mut output| output.flush()).map_err(failed)?;
        return Ok(None);
    }
    // Whom it concerns is the owner's business: it holds addresses and names.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    write(file, &files).and_then(|file| file.sync_all()).map_err(failed)?;
    Ok(Some(path))
}

/// The files of a report.
#[derive(Debug, Default)]
struct Files {
    files: Vec<(String, String)>,
    errors: String,
}

impl Files {
    fn add(&mut self, name: &str, text: impl Into<String>) {
        self.files.push((name.to_owned(), text.into()));
    }

    /// A file, or why there is none.
    fn try_add<E: std::error::Error>(&mut self, name: &str, text: Result<String, E>) {
        match text {
            Ok(text) => self.add(name, text),
            Err(error) => self.errors += &format!("{name}: {error}\n"),
        }
    }
}

fn collect(args: &ReportArgs) -> Files {
    let mut files = Files::default();
    files.add("README.txt", README);
    let pins = &args.pins.pin_path;
    match Status::read(pins, &args.daemon) {
        Ok(status) => {
            files.add("status.txt", anstream::adapter::strip_str(&status.text(true)).to_string());
            files.try_add("status.json", output::json(&status));
        }
        Err(error) => files.errors += &format!("status: {error}\n"),
    }
    match views::all(pins, ROWS) {
        Ok(views) => views.into_iter().for_each(|(name, text)| files.add(&format!("{name}.json"), text)),
        Err(error) => files.errors += &format!("views: {error}\n"),
    }
    let body = |answer: io::Result<(::http::StatusCode, String)>| answer.map(|(_, body)| body);
    files.try_add("healthz.json", body(http::get(&args.daemon.healthz_bind_address, "/healthz")));
    files.try_add("metrics.txt", body(http::get(&args.daemon.metrics_bind_address, "/metrics")));
    files.try_add("daemon.txt", machine::daemon(pins));
    files.add("machine.txt", machine::machine());
    files.try_add("kernel-config.txt", machine::kernel_config());
    files.try_add("interfaces.txt", machine::interfaces());
    let errors = std::mem::take(&mut files.errors);
    files.add("errors.txt", errors);
    files
}

/// Writes the archive, and returns what it went to.
fn write<W: Write>(output: W, files: &Files) -> io::Result<W> {
    let mut archive = tar::Builder::new(GzEncoder::new(output, Compression::default()));
    for (name, text) in &files.files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(Timestamp::now().as_second()).unwrap_or_default());
        archive.append_data(&mut header, format!("sheave-report/{name}"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()
}
