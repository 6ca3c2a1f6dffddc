//! The options in the base's ConfigMap, the chart's values and the chart's schema, against the command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::CommandFactory as _;
use serde_json::Value;
use sheave::cli::Cli;
use sheave_tests::kubectl::{documents, kustomize};

use super::folder;

/// Options that belong to the DaemonSet's node and mounts, not to who installs it.
const OF_THE_POD: [&str; 3] = ["SHEAVE_CGROUP", "SHEAVE_NODE_NAME", "SHEAVE_PIN_PATH"];

/// The variables of `sheave run`, with their defaults.
fn command_line() -> Result<BTreeMap<String, Option<String>>> {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").context("no `sheave run`")?;
    let options = run.get_arguments().chain(cli.get_arguments());
    let named = options.filter_map(|option| {
        let default = option.get_default_values().iter().map(|value| value.to_string_lossy().into_owned());
        Some((option.get_env()?.to_string_lossy().into_owned(), default.reduce(|all, next| format!("{all},{next}"))))
    });
    Ok(named.collect())
}

/// The variables that a file sets (with their values) or names in a comment, as `NAME=value` or as `NAME: "value"`.
fn written(file: PathBuf) -> Result<BTreeMap<String, Option<String>>> {
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let options = text.lines().filter_map(|line| {
        let line = line.trim();
        let (is_set, option) = line.strip_prefix("# ").map_or((true, line), |comment| (false, comment));
        let option = option.strip_prefix("- ").unwrap_or(option);
        let (name, value) = option.split_once('=').or_else(|| option.split_once(": "))?;
        let is_name = name.starts_with("SHEAVE_") && !name.contains(' ');
        is_name.then(|| (name.to_owned(), is_set.then(|| value.trim_matches('"').to_owned())))
    });
    Ok(options.collect())
}

/// A new option could not be set in a cluster, or would be set to what was once its default.
#[test]
fn every_option_can_be_set_and_has_its_default() -> Result<()> {
    let mut expected = command_line()?;
    for name in OF_THE_POD {
        ensure!(expected.remove(name).is_some(), "{name} is no option any more");
    }
    for file in ["kustomize/kustomization.yaml", "helm/sheave/values.yaml"] {
        let written = written(folder().join(file))?;
        for (name, default) in &expected {
            let found = written.get(name).with_context(|| format!("deploy/{file} does not have {name}"))?;
            ensure!(found == default, "deploy/{file}: {name} is {found:?}, by default {default:?}");
        }
        let strange: Vec<_> = written.keys().filter(|name| !expected.contains_key(*name)).collect();
        ensure!(strange.is_empty(), "deploy/{file} has {strange:?}, which are no options");
    }
    let schema: Value = serde_json::from_slice(&fs::read(folder().join("helm/sheave/values.schema.json"))?)?;
    let names = schema["properties"]["config"]["propertyNames"]["enum"].as_array().context("no names in the schema")?;
    let mut names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
    names.sort_unstable();
    ensure!(expected.keys().eq(names.iter()), "the chart's schema has {names:?}");
    Ok(())
}

/// An option of the pod's own would be missing, and so point to a place that the container doesn't have.
#[test]
fn the_pods_own_options_are_in_the_daemon_set() -> Result<()> {
    let objects = kustomize(&folder().join("kustomize"))?;
    let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").context("no DaemonSet")?;
    let variables = daemon_set["spec"]["template"]["spec"]["containers"][0]["env"].as_array().context("no env")?;
    let mut names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
    names.sort_unstable();
    ensure!(names == OF_THE_POD, "{names:?}");
    Ok(())
}

/// A value that isn't in the schema would be taken for a mistake, and one that is no value for something that works.
#[test]
fn the_schema_has_the_charts_values() -> Result<()> {
    let chart = folder().join("helm/sheave");
    let schema: Value = serde_json::from_slice(&fs::read(chart.join("values.schema.json"))?)?;
    let values = documents(&fs::read_to_string(chart.join("values.yaml"))?)?;
    let known = |value: &Value| value.as_object().map(|fields| fields.keys().cloned().collect::<Vec<_>>());
    let mut in_schema = known(&schema["properties"]).context("no properties")?;
    // Helm's own.
    in_schema.retain(|name| name != "global");
    let mut in_values = known(&values[0]).context("no values")?;
    in_schema.sort_unstable();
    in_values.sort_unstable();
    ensure!(in_schema == in_values, "the schema has {in_schema:?}, values.yaml {in_values:?}");
    Ok(())
}
