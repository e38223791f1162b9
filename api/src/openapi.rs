//! The OpenAPI description of the API, made from the wire types and the table of endpoints: `openapi.yaml` is what
//! [`yaml`] returns, and a test compares the two. Cloud Hypervisor's paths, methods and success codes; refusals are
//! podvisor's, each an array of causes.

mod yaml;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::endpoints::{Answer, Body, ENDPOINTS, Endpoint, REFUSED, Takes};
use crate::types::{
    DeviceConfig, DiskConfig, FsConfig, NetConfig, PciDeviceInfo, PmemConfig, RestoreConfig, VmConfig, VmInfo,
    VmRemoveDevice, VmResize, VmResizeDisk, VmResizeZone, VmSnapshotConfig, VmmPingResponse, VsockConfig,
};

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Counters by device and name.
fn counters(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "type": "object",
        "additionalProperties": { "type": "object", "additionalProperties": { "type": "integer" } },
    })
}

/// An object that podvisor does not look into, for it does not do what it asks.
fn anything(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({ "type": "object" })
}

/// The method, as the document spells it.
fn method(endpoint: &Endpoint) -> String {
    endpoint.method.as_str().to_lowercase()
}

/// The schema of a body.
fn schema(body: Body, generator: &mut SchemaGenerator) -> Schema {
    let schema_of: SchemaOf = match body {
        Body::VmConfig => of::<VmConfig>,
        Body::VmInfo => of::<VmInfo>,
        Body::Counters => counters,
        Body::VmmPingResponse => of::<VmmPingResponse>,
        Body::VmResize => of::<VmResize>,
        Body::VmResizeDisk => of::<VmResizeDisk>,
        Body::VmResizeZone => of::<VmResizeZone>,
        Body::VmRemoveDevice => of::<VmRemoveDevice>,
        Body::VmSnapshotConfig => of::<VmSnapshotConfig>,
        Body::RestoreConfig => of::<RestoreConfig>,
        Body::DeviceConfig => of::<DeviceConfig>,
        Body::DiskConfig => of::<DiskConfig>,
        Body::FsConfig => of::<FsConfig>,
        Body::NetConfig => of::<NetConfig>,
        Body::PmemConfig => of::<PmemConfig>,
        Body::VsockConfig => of::<VsockConfig>,
        Body::Object => anything,
    };
    schema_of(generator)
}

/// What went wrong, by status: its name in the document, what it says.
const REFUSALS: &[(&str, &str, &str)] = &[
    (
        "400",
        "Invalid",
        "The request cannot be: the causes name the field and its value",
    ),
    (
        "403",
        "WillNot",
        "podvisor does not do that; the causes say what to do instead",
    ),
    ("404", "Absent", "There is no VM, or no such device"),
    ("405", "NotNow", "The VM is not booted"),
    (
        "409",
        "Conflict",
        "The VM's state, or what it has already, does not allow it",
    ),
    ("429", "Pending", "The guest has not done yet what it was asked before"),
    ("500", "Failed", "It was tried and failed"),
    ("4XX", "Refused", "Refused for another reason"),
    ("5XX", "Unavailable", "The monitor cannot answer now"),
];

/// A field that may be left out may also be null; an integer ends where its type does.
fn widen(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    let limit = match object.get("format").and_then(Value::as_str) {
        Some("uint8") => Some(u64::from(u8::MAX)),
        Some("uint16") => Some(u64::from(u16::MAX)),
        Some("uint32") => Some(u64::from(u32::MAX)),
        Some("uint64" | "uint") => Some(u64::MAX),
        Some("int64") => Some(i64::MAX.unsigned_abs()),
        _ => None,
    };
    if let Some(limit) = limit {
        object.insert("maximum".to_owned(), limit.into());
    }
    let required: Vec<Value> = object
        .get("required")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let Some(Value::Object(properties)) = object.get_mut("properties") else {
        return;
    };
    for (name, property) in properties {
        if let (false, Value::Object(property)) = (required.contains(&json!(name)), property) {
            nullable(property);
        }
    }
}

fn nullable(schema: &mut Map<String, Value>) {
    if let Some(target) = schema.remove("$ref") {
        schema.insert("anyOf".to_owned(), json!([{ "$ref": target }, { "type": "null" }]));
        return;
    }
    match schema.get_mut("type") {
        Some(Value::Array(types)) if !types.contains(&json!("null")) => types.push(json!("null")),
        Some(Value::String(one)) if one != "null" => {
            let types = json!([one.clone(), "null"]);
            schema.insert("type".to_owned(), types);
        }
        _ => {}
    }
}

fn content(schema: &Value) -> Value {
    json!({ "application/json": { "schema": schema } })
}

/// The refusals, each an array of causes.
fn refusals() -> Value {
    let causes = content(&json!({ "$ref": "#/components/schemas/Causes" }));
    let named = |(_, name, description): &(&str, &str, &str)| {
        let response = json!({ "description": description, "content": causes });
        ((*name).to_owned(), response)
    };
    Value::Object(REFUSALS.iter().map(named).collect())
}

fn responses(endpoint: &Endpoint, generator: &mut SchemaGenerator) -> Value {
    let mut all = Map::new();
    let mut add = |status: &str, description: &str, schema: Option<Schema>| {
        let mut response = json!({ "description": description });
        if let (Some(schema), Some(response)) = (schema, response.as_object_mut()) {
            response.insert("content".to_owned(), content(schema.as_value()));
        }
        all.insert(status.to_owned(), response);
    };
    match endpoint.answer {
        // Nothing but refusals comes from what is refused.
        _ if endpoint.refused.is_some() => {}
        Answer::Nothing => add("204", "Done", None),
        Answer::Empty => add("200", "Done", None),
        Answer::Json(body) => add("200", "The answer", Some(schema(body, generator))),
        Answer::Device => {
            add(
                "200",
                "The VM runs and has the device",
                Some(generator.subschema_for::<PciDeviceInfo>()),
            );
            add("204", "The device is in the configuration", None);
        }
    }
    for (status, name, _) in REFUSALS {
        let shared = json!({ "$ref": format!("#/components/responses/{name}") });
        all.insert((*status).to_owned(), shared);
    }
    Value::Object(all)
}

fn operation(endpoint: &Endpoint, generator: &mut SchemaGenerator) -> Value {
    let mut operation = json!({
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "responses": responses(endpoint, generator),
    });
    let Some(fields) = operation.as_object_mut() else {
        return operation;
    };
    if let Some(why) = endpoint.refused {
        fields.insert(
            "description".to_owned(),
            json!(format!("Refused with {REFUSED}: {why}.")),
        );
    }
    if let Takes::Json(body) = endpoint.takes {
        let schema = schema(body, generator);
        fields.insert(
            "requestBody".to_owned(),
            json!({ "required": true, "content": content(schema.as_value()) }),
        );
    }
    operation
}

/// The description as a JSON document (OpenAPI 3.1).
#[must_use]
pub fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.with_transform(RecursiveTransform(widen)).into_generator();
    let mut paths = Map::new();
    for endpoint in ENDPOINTS {
        let operation = operation(endpoint, &mut generator);
        paths.insert(format!("/{}", endpoint.name), json!({ method(endpoint): operation }));
    }
    let mut schemas = generator.take_definitions(true);
    schemas.insert(
        "Causes".to_owned(),
        json!({
            "description": "Why a request was refused: the error, then cause after cause.",
            "type": "array",
            "items": { "type": "string" },
            "minItems": 1,
        }),
    );
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "podvisor",
            "description": "The API of podvisor on its UNIX socket: Cloud Hypervisor's REST API. Keys that are not \
                described are ignored; null is as if absent.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "version": "0.3.0",
        },
        "servers": [{ "url": "http://localhost/api/v1" }],
        "paths": paths,
        "components": { "responses": refusals(), "schemas": schemas },
    })
}

/// [`document`] as YAML: the text of `openapi.yaml`.
#[must_use]
pub fn yaml() -> String {
    let mut text =
        String::from("# Made from the wire types: cargo run -p podvisor-api --example openapi > api/openapi.yaml\n");
    yaml::write(&document(), &mut text);
    text
}

#[cfg(test)]
mod tests;
