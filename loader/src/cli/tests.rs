//! What users type, and what they are told.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use super::{Cli, CliError, Command, completions, manual};
use crate::config::{
    Bypass, ConnectMode, DrainForeign, ExternalIps, NodePortAddresses, RunConfig, SourceConfig, XdpMode,
};

fn run(flags: &[&str]) -> Result<RunConfig, CliError> {
    let cli = Cli::parse_from(["sheave", "run", "--node-name", "node-1"].iter().chain(flags));
    match cli.command {
        Command::Run(args) => args.config(),
        other => panic!("not run: {other:?}"),
    }
}

fn refused(flags: &[&str]) -> String {
    Cli::try_parse_from(["sheave", "run"].iter().chain(flags)).expect_err("should be refused").to_string()
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn shells_and_manual_pages_know_every_command() {
    let folder = std::env::temp_dir().join(format!("sheave-manual-{}", std::process::id()));
    manual(&folder).expect("a writable folder");
    let script = completions(clap_complete::Shell::Bash);
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        assert!(script.contains(&format!("sheave__subcmd__{name})")), "{name}");
        let page = std::fs::read_to_string(folder.join(format!("sheave-{name}.1"))).expect(name);
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
    std::fs::remove_dir_all(&folder).expect("the folder is ours");
}

#[test]
fn no_flags_give_the_documented_defaults() {
    let expected =
        RunConfig::new(SourceConfig::Kubernetes { kubeconfig: None, api_servers: Vec::new() }, "node-1".to_owned());
    assert_eq!(run(&[]).unwrap(), expected);
}

#[test]
fn every_flag_has_an_environment_variable() {
    let command = Cli::command();
    let subcommands = command.get_subcommands().filter(|command| command.get_name() != "help");
    for arg in subcommands.flat_map(clap::Command::get_arguments).chain(command.get_arguments()) {
        let Some(long) = arg.get_long().filter(|long| !["help", "version"].contains(long)) else { continue };
        let expected = format!("SHEAVE_{}", long.to_uppercase().replace('-', "_"));
        assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(expected.as_str()), "--{long}");
    }
}

#[test]
fn flags_reach_the_configuration() {
    let config = run(&[
        "--manifests=/etc/sheave",
        "--pin-path=/sys/fs/bpf/other",
        "--cgroup=/sys/fs/cgroup/x",
        "--connect=all",
        "--xdp=off",
        "--pod-interfaces=cali*,veth*",
        "--uplink-interfaces=eth0",
        "--tunnel-interfaces=flannel.1",
        "--ignore-interfaces=docker0",
        "--nodeport-addresses=10.0.0.0/8,fd00::/8",
        "--external-ips=false",
        "--syn-failover=false",
        "--hairpin-ipv4=169.254.1.1",
        "--hairpin-ipv6=fd00::1",
        "--timeout-syn=5",
        "--timeout-established=2h",
        "--snat-ports=50000-50999",
        "--rejects-per-second=7",
        "--drain-foreign",
        "--drain=10m",
        "--bypass-netfilter=force",
        "--max-conntrack=1024",
        "--healthz-bind-address=192.0.2.1:80,[2001:db8::1]:80",
        "--metrics-bind-address=",
        "--health-timeout=90",
        "--audit-period=0",
    ])
    .unwrap();
    assert_eq!(config.source, SourceConfig::Manifests(PathBuf::from("/etc/sheave")));
    assert_eq!(config.pin_path, PathBuf::from("/sys/fs/bpf/other"));
    assert_eq!(config.cgroup, Some(PathBuf::from("/sys/fs/cgroup/x")));
    assert_eq!((config.connect, config.xdp), (ConnectMode::All, XdpMode::Off));
    assert_eq!(config.interfaces.pods, ["cali*", "veth*"]);
    assert_eq!(config.interfaces.uplinks, ["eth0"]);
    assert_eq!(config.interfaces.tunnels, ["flannel.1"]);
    assert_eq!(config.interfaces.ignored, ["docker0"]);
    let networks: Vec<(IpAddr, u8)> = vec![("10.0.0.0".parse().unwrap(), 8), ("fd00::".parse().unwrap(), 8)];
    assert_eq!(config.nodeport_addresses, NodePortAddresses::Networks(networks));
    assert_eq!(config.external_ips, ExternalIps::None);
    assert!(!config.syn_failover);
    assert_eq!((config.drain_foreign, config.drain), (DrainForeign::On, Some(Duration::from_secs(600))));
    assert_eq!(config.bypass_netfilter, Bypass::Force);
    assert_eq!(config.hairpin4.to_string(), "169.254.1.1");
    assert_eq!(config.hairpin6.to_string(), "fd00::1");
    assert_eq!((config.timeouts.syn, config.timeouts.established, config.timeouts.closing), (5, 7_200, 120));
    assert_eq!((config.snat_ports, config.rejects_per_second), ((50_000, 50_999), 7));
    assert_eq!(config.sizes.conntrack, Some(1_024));
    assert_eq!(config.healthz.0, ["192.0.2.1:80".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap()]);
    assert!(config.metrics.0.is_empty());
    assert_eq!((config.health_timeout.as_secs(), config.audit_period), (90, None));
}

#[test]
fn two_sources_are_refused_by_name() {
    let error = run(&["--manifests=/m", "--api-server=https://10.0.0.1:6443"]).unwrap_err().to_string();
    assert!(error.contains("--manifests") && error.contains("--api-server"), "{error}");
}

#[test]
fn bad_values_name_the_flag_and_the_remedy() {
    for (flag, remedy) in [
        ("--connect=some", "write host"),
        ("--xdp=yes", "write auto"),
        ("--snat-ports=70000", "10000-29999"),
        ("--snat-ports=200-100", "10000-29999"),
        ("--timeout-syn=0", "at least one second"),
        ("--timeout-syn=5w", "5m"),
        ("--nodeport-addresses=10.0.0.0/33", "10.0.0.0/33"),
        ("--nodeport-addresses=10.0.0.1", "no network"),
        ("--external-ips=192.0.2.1", "true, false, or networks"),
        ("--max-conntrack=0", "not in 2.."),
        ("--healthz-bind-address=10256", "0.0.0.0:10256"),
        ("--health-timeout=never", "at least one second"),
        ("--audit-period=0s", "0 for never"),
        ("--pod-interfaces=a b", "cali*"),
        ("--drain-foreign=soon", "auto, true, false"),
        ("--drain=soon", "2h"),
        ("--hairpin-ipv4=no", "invalid IPv4"),
    ] {
        let error = refused(&[flag]);
        let name = flag.split('=').next().unwrap();
        assert!(error.contains(name) && error.contains(remedy), "{flag}: {error}");
    }
    let error = run(&["--pin-path=relative"]).unwrap_err().to_string();
    assert!(error.contains("--pin-path") && error.contains("absolute"), "{error}");
}
