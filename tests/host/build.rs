//! Lists the programs' modules: those that `ebpf/src/main.rs` has, but for the connect-time ones and what this crate has itself.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// Connect-time programs have no packet; what the kernel can do is a setting here.
const OTHERS: [&str; 2] = ["socket", "features"];

fn main() -> Result<(), Box<dyn Error>> {
    let programs = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../ebpf/src").canonicalize()?;
    println!("cargo:rerun-if-changed={}", programs.join("main.rs").display());
    let mut modules = String::new();
    for line in fs::read_to_string(programs.join("main.rs"))?.lines() {
        let Some(name) = line.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) else { continue };
        if OTHERS.contains(&name) {
            continue;
        }
        let file = [format!("{name}.rs"), format!("{name}/mod.rs")].map(|file| programs.join(file));
        let file = file.iter().find(|file| file.is_file()).ok_or_else(|| format!("no file of module {name}"))?;
        writeln!(modules, "#[path = {file:?}]\npub mod {name};")?;
    }
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("programs.rs"), modules)?;
    Ok(())
}
