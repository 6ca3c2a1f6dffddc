//! Label and field selectors, as the API reads them.

use serde_json::Value;

/// A label selector: all of its requirements hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
}

impl Selector {
    /// Reads `a,!b,c=d,e!=f,g in (h,i),j notin (k)`.
    pub(super) fn parse(text: &str) -> Self {
        let mut requirements = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let mut depth = 0;
            let end = rest.find(|character| {
                depth += i32::from(character == '(') - i32::from(character == ')');
                character == ',' && depth == 0
            });
            let (one, next) = end.map_or((rest, ""), |end| (&rest[..end], &rest[end + 1..]));
            requirements.push(Requirement::parse(one.trim()));
            rest = next.trim();
        }
        Self(requirements)
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str);
        self.0.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::Absent(key) => label(key).is_none(),
            Requirement::In(key, values) => label(key).is_some_and(|label| values.iter().any(|value| value == label)),
            Requirement::NotIn(key, values) => label(key).is_none_or(|label| values.iter().all(|value| value != label)),
        })
    }
}

impl Requirement {
    fn parse(text: &str) -> Self {
        let set = |text: &str| text.trim_matches(['(', ')']).split(',').map(|value| value.trim().to_owned()).collect();
        if let Some(key) = text.strip_prefix('!') {
            Self::Absent(key.to_owned())
        } else if let Some((key, values)) = text.split_once(" notin ") {
            Self::NotIn(key.trim().to_owned(), set(values.trim()))
        } else if let Some((key, values)) = text.split_once(" in ") {
            Self::In(key.trim().to_owned(), set(values.trim()))
        } else if let Some((key, value)) = text.split_once("!=") {
            Self::NotIn(key.to_owned(), vec![value.to_owned()])
        } else if let Some((key, value)) = text.split_once('=') {
            Self::In(key.to_owned(), vec![value.trim_start_matches('=').to_owned()])
        } else {
            Self::Exists(text.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_selects_what_the_api_would() {
        let object = serde_json::json!({"metadata": {"labels": {"a": "1", "b": "2"}}});
        for (text, selected) in [
            ("", true),
            ("a", true),
            ("c", false),
            ("!a", false),
            ("!c,!d", true),
            ("a=1,b==2", true),
            ("a=2", false),
            ("a!=2,c!=3", true),
            ("a in (1, 2),b", true),
            ("a notin (1,2)", false),
            ("c notin (1)", true),
        ] {
            assert_eq!(Selector::parse(text).matches(&object), selected, "{text}");
        }
    }
}
