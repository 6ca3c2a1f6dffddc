//! A real `kubectl` in a network namespace, with a configuration and a cache of its own.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::netns::Namespace;

/// A kubectl that asks one API server. What it keeps on disk is removed on drop.
#[derive(Debug)]
pub struct Kubectl {
    namespace: Namespace,
    folder: PathBuf,
}

impl Kubectl {
    /// One that runs in a namespace and reads this kubeconfig.
    ///
    /// # Errors
    /// If the kubeconfig can't be written.
    pub fn new(namespace: &Namespace, kubeconfig: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(crate::leftovers::unique_name());
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let kubectl = Self { namespace: namespace.clone(), folder };
        fs::write(kubectl.kubeconfig(), kubeconfig).context("writing a kubeconfig")?;
        Ok(kubectl)
    }

    /// Path of the kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// Runs it and returns what it prints.
    ///
    /// # Errors
    /// If it isn't there or fails; with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, "")
    }

    /// `kubectl create -f` of this text. Without validation: old kubectls can't do it without the server's OpenAPI document.
    ///
    /// # Errors
    /// If it isn't there or fails; with what it said.
    pub fn create(&self, manifests: &str) -> Result<String> {
        self.run_with(&["create", "--validate=false", "-f", "-"], manifests)
    }

    fn run_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.namespace.command("kubectl");
        command
            .args(arguments)
            .arg("--request-timeout=20s")
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", &self.folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run kubectl (`cargo xtask setup` installs it on Debian)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).context("writing to kubectl")?;
        }
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {said}", arguments.join(" "));
        String::from_utf8(output.stdout).context("kubectl printed something else than text")
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What `kubectl kustomize` makes of a folder.
///
/// # Errors
/// If kubectl isn't there or fails; with what it said.
pub fn kustomize(folder: &Path) -> Result<Vec<Value>> {
    let output = Command::new("kubectl").arg("kustomize").arg(folder).output();
    let output = output.context("cannot run kubectl (`cargo xtask setup` installs it on Debian)")?;
    ensure!(output.status.success(), "kubectl kustomize: {}", String::from_utf8_lossy(&output.stderr));
    documents(std::str::from_utf8(&output.stdout)?)
}

/// The objects of a YAML text, whose documents are parted by lines of `---`.
///
/// # Errors
/// If one isn't YAML.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let is_empty = |text: &str| text.lines().all(|line| line.trim().is_empty() || line.trim().starts_with('#'));
    documents.filter(|document| !is_empty(document)).map(|text| Ok(serde_saphyr::from_str(text)?)).collect()
}
