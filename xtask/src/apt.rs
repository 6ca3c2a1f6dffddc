//! Debian's packages. Installing one here starts no server on the machine, now or with its next boot.

use std::path::Path;
use std::process::Stdio;

use anyhow::Result;

use crate::process::{self, is_root, output, say};

/// Services of packages that setup installs. The tests run these programs themselves, in network namespaces of their own.
const SERVICES: &[&str] = &["nginx"];

/// Runs the command after it while Debian's packages are told not to start what they bring: invoke-rc.d asks this file. A
/// machine that has one has made up its mind already.
const WITHOUT_SERVICES: &str = "policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy || exit
fi
\"$@\"";

/// Whether apt can install every one of these.
pub(crate) fn offered(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        output("apt-cache", &["policy", package])
            .is_some_and(|policy| policy.contains("Candidate:") && !policy.contains("Candidate: (none)"))
    })
}

/// `apt-get update`.
pub(crate) fn update() -> Result<()> {
    say_root("apt-get update");
    apt_get(&["update", "-q"])
}

/// `apt-get install` of packages that are missing.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    say_root(&format!("apt-get install {}", packages.join(" ")));
    apt_get(&[&["install", "-q", "-y", "--no-install-recommends"], packages].concat())?;
    // They were missing, so these services are not the user's.
    let fresh = SERVICES.iter().filter(|service| packages.contains(service));
    for service in fresh.filter(|service| Path::new("/etc/init.d").join(service).exists()) {
        say(&format!("the service {service} stays off, also after the next boot"));
        process::run(process::root("update-rc.d").args([service, "disable"]).stdin(Stdio::null()))?;
    }
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    // `env` because sudo keeps only the environment that its policy lets through.
    process::run(
        process::root("env")
            .args(["DEBIAN_FRONTEND=noninteractive", "sh", "-c", WITHOUT_SERVICES, "sh"])
            .args(["apt-get", "-o", "Acquire::Retries=3"])
            .args(arguments)
            .stdin(Stdio::null()),
    )
}

fn say_root(command: &str) {
    if is_root() {
        say(command);
    } else {
        say(&format!("sudo {command}"));
    }
}
