//! `cargo xtask deny`: known vulnerabilities, licences and origins of the dependencies, by cargo-deny, as `.ci/deny.toml` says.

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::process::{self, output, say};

const VERSION: &str = "0.20.2";
const RULES: &str = ".ci/deny.toml";

#[derive(Args)]
pub(crate) struct Options {
    /// Fail where the database of advisories can't be reached, instead of saying so
    #[arg(long)]
    require_advisories: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if output("cargo-deny", &["--version"]).is_none() {
        say("building cargo-deny, which checks the dependencies (about two minutes)");
        let mut cargo = process::cargo(&["install", "--locked", "cargo-deny", "--version", VERSION]);
        // Without optimisation, whose result would not live long enough here to pay for itself.
        process::run(cargo.args(["--no-default-features", "--debug"]))
            .context("see https://github.com/EmbarkStudios/cargo-deny for other ways to install it")?;
    }
    deny(&["check", "licenses", "bans", "sources"])?;
    if deny(&["fetch", "db"]).is_ok() {
        return deny(&["check", "advisories"]);
    }
    let unreachable = "the database of advisories (github.com/RustSec/advisory-db) can't be reached";
    if options.require_advisories {
        bail!("{unreachable}; without --require-advisories that is no failure");
    }
    say(&format!("{unreachable}: known vulnerabilities were NOT looked for"));
    Ok(())
}

fn deny(arguments: &[&str]) -> Result<()> {
    process::run(process::cargo(&["deny", "--all-features", "--config", RULES]).args(arguments))
}
