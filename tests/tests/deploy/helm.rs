//! Helm's part that the chart needs: a template engine for Go's templates, and the few functions that Helm adds.
//!
//! Not Helm itself, which few machines have: what differs is that a method can't be given arguments.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use gtmpl::{Context, FuncError, Template, Value};
use serde_json::Value as Json;
use sheave_tests::kubectl::documents;

/// Renders a chart's templates with its default values, over which `values` go, into objects.
pub(crate) fn render(chart: &Path, values: &Json) -> Result<Vec<Json>> {
    let yaml = |file: &str| -> Result<Json> {
        let text = fs::read_to_string(chart.join(file)).with_context(|| format!("reading {file}"))?;
        serde_saphyr::from_str(&text).with_context(|| format!("reading {file}"))
    };
    let metadata = yaml("Chart.yaml")?;
    let mut merged = yaml("values.yaml")?;
    merge(&mut merged, values);
    let root = serde_json::json!({
        "Values": merged,
        "Release": {"Namespace": "kube-system", "Name": "sheave"},
        "Chart": {"AppVersion": metadata["appVersion"]},
        "Dashboard": fs::read_to_string(chart.join("files/sheave.json"))?,
    });
    let mut objects = Vec::new();
    let mut templates: Vec<_> = fs::read_dir(chart.join("templates"))?.collect::<Result<_, _>>()?;
    templates.sort_by_key(fs::DirEntry::file_name);
    for template in templates.into_iter().filter(|entry| entry.path().extension().is_some_and(|end| end == "yaml")) {
        let name = template.file_name().to_string_lossy().into_owned();
        let text = fs::read_to_string(template.path())?.replace(".Files.Get \"files/sheave.json\"", ".Dashboard");
        let rendered = one(&text, &root).with_context(|| format!("rendering {name}"))?;
        objects.extend(documents(&rendered).with_context(|| format!("{name}:\n{rendered}"))?);
    }
    Ok(objects)
}

fn one(text: &str, root: &Json) -> Result<String> {
    let mut template = Template::default();
    template.add_funcs(&[
        ("fail", fail as gtmpl::Func),
        ("nindent", nindent),
        ("quote", quote),
        ("sha256sum", sha256sum),
        ("toJson", to_json),
        ("toYaml", to_yaml),
    ]);
    template.parse(text).map_err(|error| anyhow!("{error}"))?;
    template.render(&Context::from(value(root))).map_err(|error| anyhow!("{error}"))
}

/// Maps are merged, `null` removes, all else replaces.
fn merge(into: &mut Json, from: &Json) {
    let (Json::Object(into), Json::Object(from)) = (&mut *into, from) else {
        *into = from.clone();
        return;
    };
    for (key, value) in from {
        if value.is_null() {
            into.remove(key);
        } else {
            merge(into.entry(key).or_insert(Json::Null), value);
        }
    }
}

fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => number.as_i64().map_or_else(|| number.as_f64().unwrap_or_default().into(), Value::from),
        Json::String(text) => Value::String(text.clone()),
        Json::Array(values) => Value::Array(values.iter().map(value).collect()),
        Json::Object(fields) => {
            Value::Map(fields.iter().map(|(key, field)| (key.clone(), value(field))).collect::<HashMap<_, _>>())
        }
    }
}

fn json(value: &Value) -> Json {
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::String(text) => Json::String(text.clone()),
        Value::Array(values) => values.iter().map(json).collect(),
        Value::Object(fields) | Value::Map(fields) => {
            fields.iter().map(|(key, field)| (key.clone(), json(field))).collect::<serde_json::Map<_, _>>().into()
        }
        Value::Number(number) => number.as_i64().map_or_else(|| number.as_f64().into(), Json::from),
        Value::NoValue | Value::Nil | Value::Function(_) => Json::Null,
    }
}

fn argument(arguments: &[Value], index: usize) -> Result<&Value, FuncError> {
    arguments.get(index).ok_or_else(|| FuncError::AtLeastXArgs("a function of Helm's".to_owned(), index + 1))
}

fn fail(arguments: &[Value]) -> Result<Value, FuncError> {
    Err(FuncError::Generic(argument(arguments, 0)?.to_string()))
}

fn quote(arguments: &[Value]) -> Result<Value, FuncError> {
    Ok(Value::String(Json::String(argument(arguments, 0)?.to_string()).to_string()))
}

fn to_json(arguments: &[Value]) -> Result<Value, FuncError> {
    Ok(Value::String(json(argument(arguments, 0)?).to_string()))
}

fn to_yaml(arguments: &[Value]) -> Result<Value, FuncError> {
    let text = serde_saphyr::to_string(&json(argument(arguments, 0)?));
    Ok(Value::String(text.map_err(|error| FuncError::Generic(error.to_string()))?.trim_end().to_owned()))
}

/// Not the sum that its name says: something that is another where the text is.
fn sha256sum(arguments: &[Value]) -> Result<Value, FuncError> {
    use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
    let text = argument(arguments, 0)?.to_string();
    Ok(Value::String(format!("sum-{:x}", BuildHasherDefault::<DefaultHasher>::default().hash_one(text))))
}

fn nindent(arguments: &[Value]) -> Result<Value, FuncError> {
    let width = match argument(arguments, 0)? {
        Value::Number(number) => number.as_u64().and_then(|width| usize::try_from(width).ok()),
        _ => None,
    };
    let width = width.ok_or_else(|| FuncError::Generic("nindent takes a number and a text".to_owned()))?;
    let text = argument(arguments, 1)?.to_string();
    Ok(Value::String(text.lines().map(|line| format!("\n{:width$}{line}", "")).collect()))
}
