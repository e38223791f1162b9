//! The description is the one in the tree, and says of every document what the parser says of it.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;
use crate::from_json;
use crate::types::VmState;

#[test]
fn the_file_in_the_tree_is_what_the_types_say() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.yaml");
    let there = std::fs::read_to_string(file).unwrap();
    let differs = there
        .lines()
        .zip(yaml().lines())
        .find(|(a, b)| a != b)
        .map(|(a, b)| format!("{a}\n{b}"));
    assert!(
        there == yaml(),
        "api/openapi.yaml is not what the types say; make it again as its first line says. First difference:\n{differs:?}"
    );
}

#[test]
fn every_endpoint_is_described() {
    let document = document();
    assert_eq!(document["paths"].as_object().unwrap().len(), ENDPOINTS.len());
    for endpoint in ENDPOINTS {
        let operation = &document["paths"][format!("/{}", endpoint.name)][method(endpoint)];
        let statuses: Vec<_> = operation["responses"].as_object().unwrap().keys().cloned().collect();
        let expected: &[&str] = match endpoint.answer {
            _ if endpoint.refused.is_some() => &["400", "403"],
            Answer::Nothing => &["204"],
            Answer::Empty | Answer::Json(_) => &["200"],
            Answer::Device => &["200", "204"],
        };
        assert_eq!(statuses[..expected.len()], *expected, "{}", endpoint.name);
        assert!(statuses.contains(&"400".to_owned()) && statuses.contains(&"5XX".to_owned()));
        let takes = matches!(endpoint.takes, Takes::Json(_));
        assert_eq!(operation.get("requestBody").is_some(), takes);
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 40);
    for reference in &found {
        assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
    }
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for name in schemas.keys() {
        assert!(
            found.contains(&format!("#/components/schemas/{name}")),
            "{name} is used nowhere"
        );
    }
}

/// A JSON Schema validator for the keywords that the description uses.
struct Checker(Value);

impl Checker {
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(reference) => self.0.pointer(&reference[1..]).unwrap(),
            None => schema,
        }
    }

    fn is_type(value: &Value, name: &str) -> bool {
        match name {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            other => panic!("{other} is no type"),
        }
    }

    fn accepts(&self, schema: &Value, value: &Value) -> bool {
        let Some(fields) = self.resolve(schema).as_object() else {
            return self.resolve(schema) == &Value::Bool(true);
        };
        fields.iter().all(|(keyword, rule)| match keyword.as_str() {
            "type" => match rule {
                Value::String(one) => Self::is_type(value, one),
                other => other
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|one| Self::is_type(value, one.as_str().unwrap())),
            },
            "anyOf" => rule.as_array().unwrap().iter().any(|one| self.accepts(one, value)),
            "oneOf" => {
                rule.as_array()
                    .unwrap()
                    .iter()
                    .filter(|one| self.accepts(one, value))
                    .count()
                    == 1
            }
            "const" => value == rule,
            "enum" => rule.as_array().unwrap().contains(value),
            "minimum" => value.as_f64().is_none_or(|n| n >= rule.as_f64().unwrap()),
            "maximum" => value.as_u64().is_none_or(|n| n <= rule.as_u64().unwrap()),
            "items" => value
                .as_array()
                .is_none_or(|all| all.iter().all(|one| self.accepts(rule, one))),
            "required" => value.as_object().is_none_or(|o| {
                rule.as_array()
                    .unwrap()
                    .iter()
                    .all(|name| o.contains_key(name.as_str().unwrap()))
            }),
            "properties" => value.as_object().is_none_or(|o| {
                rule.as_object()
                    .unwrap()
                    .iter()
                    .all(|(name, rule)| o.get(name).is_none_or(|value| self.accepts(rule, value)))
            }),
            "additionalProperties" => rule == &Value::Bool(true),
            "description" | "default" => true,
            "format" => {
                ["uint8", "uint16", "uint32", "uint64", "uint", "int64", "ip"].contains(&rule.as_str().unwrap())
            }
            other => panic!("the checker does not know {other}"),
        })
    }

    /// A value with every field that `schema` describes.
    fn sample(&self, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        let first = |key: &str| schema.get(key).and_then(Value::as_array).and_then(|all| all.first());
        if let Some(one) = first("anyOf").or_else(|| first("oneOf")) {
            return self.sample(one);
        }
        if let Some(value) = schema.get("const").or_else(|| first("enum")) {
            return value.clone();
        }
        let kind = schema.get("type").map(|t| t.get(0).unwrap_or(t));
        match kind.and_then(Value::as_str) {
            Some("boolean") => json!(true),
            Some("integer" | "number") => json!(3),
            Some("string") if schema.get("format").is_some() => json!("192.0.2.1"),
            Some("string") => json!("/x"),
            Some("array") => json!([self.sample(&schema["items"])]),
            Some("object") => match schema.get("properties").and_then(Value::as_object) {
                Some(properties) => properties
                    .iter()
                    .map(|(name, rule)| (name.clone(), self.sample(rule)))
                    .collect(),
                None => json!({ "any": 1 }),
            },
            _ => json!({ "any": ["thing"] }),
        }
    }
}

/// Every place in `value`, as JSON pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                places(value, &format!("{at}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                places(value, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

/// Holds parser and description against each other: a document with everything, and with every part of it replaced by
/// values of other types, by null, and left out. How many documents that were, and how many both refused.
fn agree<T: JsonSchema + DeserializeOwned + Serialize>() -> (usize, usize) {
    let checker = Checker(document());
    let schema = json!({ "$ref": format!("#/components/schemas/{}", T::schema_name()) });
    let sample = checker.sample(&schema);
    let parsed: T = from_json(&serde_json::to_vec(&sample).unwrap()).unwrap_or_else(|e| panic!("{sample}: {e}"));
    assert!(checker.accepts(&schema, &sample), "{sample}");
    let told = serde_json::to_value(&parsed).unwrap();
    assert!(
        checker.accepts(&schema, &told),
        "what is told is not what is described: {told}"
    );
    let mut found = Vec::new();
    places(&sample, "", &mut found);
    let (mut tried, mut refused) = (0, 0);
    let mut hold = |document: &Value, what: &str| {
        let parsed = from_json::<T>(&serde_json::to_vec(document).unwrap());
        let described = checker.accepts(&schema, document);
        let error = parsed.err();
        assert_eq!(error.is_none(), described, "{what}: {error:?} in {document}");
        tried += 1;
        refused += usize::from(!described);
    };
    let others = [
        json!(null),
        json!(true),
        json!("?"),
        json!(7),
        json!(-1),
        json!(256),
        json!(70_000),
        json!(1u64 << 32),
        json!(u64::MAX),
        json!(0.5),
        json!([]),
        json!({}),
    ];
    for place in found {
        for other in &others {
            // An address is a string with a form, which the parser checks and the format only names.
            if *other == json!("?") && (place.ends_with("/ip") || place.ends_with("/mask")) {
                continue;
            }
            let mut document = sample.clone();
            *document.pointer_mut(&place).unwrap() = other.clone();
            hold(&document, &format!("{place} = {other}"));
        }
        if let Some((parent, name)) = place.rsplit_once('/') {
            let mut document = sample.clone();
            if let Some(Value::Object(fields)) = document.pointer_mut(parent) {
                fields.remove(name);
                hold(&document, &format!("without {place}"));
            }
        }
    }
    (tried, refused)
}

#[test]
fn parser_and_description_agree_on_every_field() {
    let (tried, refused) = agree::<VmConfig>();
    assert!(
        tried > 2000 && refused > 1000 && refused < tried,
        "{refused} of {tried}"
    );
    for (tried, refused) in [
        agree::<VmInfo>(),
        agree::<VmResize>(),
        agree::<VmResizeDisk>(),
        agree::<VmResizeZone>(),
        agree::<VmRemoveDevice>(),
        agree::<VmSnapshotConfig>(),
        agree::<RestoreConfig>(),
        agree::<VmmPingResponse>(),
        agree::<PciDeviceInfo>(),
    ] {
        assert!(0 < refused && refused < tried);
    }
}

#[test]
fn what_a_new_vm_tells_is_described() {
    let checker = Checker(document());
    let info = VmInfo {
        config: VmConfig::default(),
        state: VmState::Created,
        memory_actual_size: 0,
        podvisor: Map::new(),
    };
    let schema = json!({ "$ref": "#/components/schemas/VmInfo" });
    assert!(checker.accepts(&schema, &serde_json::to_value(info).unwrap()));
    assert!(!checker.accepts(&schema, &json!({ "config": {} })));
}

#[test]
fn yaml_is_written_so_that_it_reads_back() {
    let value = json!({
        "paths": { "/vm.info": [], "on": "on", "no": null },
        "a b": ["x: y", ["in", { "deep": {} }], { "k": [1, -2.5], "z": "it's \"so\"\n" }, {}],
        "openapi": "3.1.0",
        "204": true,
        "$ref": "#/a",
    });
    let mut text = String::new();
    super::yaml::write(&value, &mut text);
    let expected = r##"openapi: "3.1.0"
paths:
  /vm.info: []
  "no": null
  "on": "on"
"$ref": "#/a"
"204": true
"a b":
  - "x: y"
  -
    - in
    - deep: {}
  - k:
      - 1
      - -2.5
    z: "it's \"so\"\n"
  - {}
"##;
    assert_eq!(text, expected);
}
