//! The tests' Kubernetes API as a server of its own, for `SHEAVE_TEST_KUBECONFIG` where no cluster is at hand, and for
//! playing with `kubectl` and `sheave run --kubeconfig`. Writes a kubeconfig and serves until it is killed.
//!
//! `kube-api KUBECONFIG`

use anyhow::{Context as _, Result, bail};
use sheave_tests::kube_api::KubeApi;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path] = arguments.as_slice() else { bail!("usage: kube-api KUBECONFIG (a file to be written)") };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no free port")?;
    let api = KubeApi::serve(listener);
    std::fs::write(path, api.kubeconfig()).with_context(|| format!("cannot write {path}"))?;
    println!("serving on {}; kubectl --kubeconfig {path} create --validate=false -f …", api.url());
    loop {
        std::thread::park();
    }
}
