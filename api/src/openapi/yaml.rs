//! JSON values as YAML 1.2: block style, every string that could be read as something else quoted as JSON quotes it.

use serde_json::Value;

/// Keys of an OpenAPI document in the order a reader expects; all others follow in alphabetical order.
const FIRST: &[&str] = &["openapi", "info", "servers", "paths", "components"];

/// Appends `value`, a mapping or a list, to `text`.
pub(super) fn write(value: &Value, text: &mut String) {
    block(value, 0, text);
}

fn indent(depth: usize, text: &mut String) {
    text.extend(std::iter::repeat_n("  ", depth));
}

fn block(value: &Value, depth: usize, text: &mut String) {
    match value {
        Value::Object(fields) => {
            let first = FIRST.iter().filter_map(|key| fields.get_key_value(*key));
            let others = fields.iter().filter(|(key, _)| !FIRST.contains(&key.as_str()));
            for (key, value) in first.chain(others) {
                indent(depth, text);
                text.push_str(&scalar(key));
                text.push(':');
                after(value, depth + 1, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                indent(depth, text);
                text.push('-');
                if let Value::Object(fields) = item
                    && !fields.is_empty()
                {
                    let mut rest = String::new();
                    block(item, depth + 1, &mut rest);
                    text.push(' ');
                    text.push_str(rest.trim_start());
                } else {
                    after(item, depth + 1, text);
                }
            }
        }
        _ => {}
    }
}

/// What follows a key or a dash: on its line, or as a block below it.
fn after(value: &Value, depth: usize, text: &mut String) {
    let empty = match value {
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => true,
    };
    if empty {
        text.push(' ');
        text.push_str(&match value {
            Value::String(string) => scalar(string),
            other => other.to_string(),
        });
        text.push('\n');
    } else {
        text.push('\n');
        block(value, depth, text);
    }
}

fn scalar(string: &str) -> String {
    let plain = string.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && string
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-' | '.'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&string.to_lowercase().as_str());
    if plain {
        string.to_owned()
    } else {
        Value::from(string).to_string()
    }
}
