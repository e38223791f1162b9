//! The OpenAPI description of the API, made from the wire types and the list of endpoints: `openapi.yaml` is what
//! [`yaml`] returns, and a test compares the two. Cloud Hypervisor's paths, methods and success codes; refusals are
//! podvisor's, each an array of causes.

mod yaml;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

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

/// What an endpoint answers when it did what it was asked.
#[derive(Clone, Copy)]
enum Success {
    /// 204.
    Nothing,
    /// 200 without a body.
    Empty,
    /// 200 with a body.
    Body(SchemaOf),
    /// 200 with where the device is when the VM runs, 204 when it was only put into the configuration.
    Device,
}

struct Endpoint {
    name: &'static str,
    summary: &'static str,
    method: &'static str,
    body: Option<SchemaOf>,
    success: Success,
}

const fn get(name: &'static str, body: SchemaOf, summary: &'static str) -> Endpoint {
    Endpoint {
        name,
        summary,
        method: "get",
        body: None,
        success: Success::Body(body),
    }
}

const fn put(name: &'static str, summary: &'static str) -> Endpoint {
    Endpoint {
        name,
        summary,
        method: "put",
        body: None,
        success: Success::Nothing,
    }
}

impl Endpoint {
    const fn taking(self, body: SchemaOf) -> Self {
        Self {
            body: Some(body),
            ..self
        }
    }

    const fn answering(self, success: Success) -> Self {
        Self { success, ..self }
    }

    const fn adding(self, body: SchemaOf) -> Self {
        self.taking(body).answering(Success::Device)
    }
}

/// Every endpoint of Cloud Hypervisor's API (openapi 0.3.0), those that podvisor refuses included.
const ENDPOINTS: &[Endpoint] = &[
    get("vmm.ping", of::<VmmPingResponse>, "Says which monitor this is"),
    put("vmm.shutdown", "Stops the VM and ends the monitor").answering(Success::Empty),
    get("vm.info", of::<VmInfo>, "Configuration and state of the VM"),
    get("vm.counters", counters, "Counters of the devices"),
    put("vm.create", "Takes the configuration of a VM").taking(of::<VmConfig>),
    put("vm.delete", "Forgets the VM"),
    put("vm.boot", "Starts the VM"),
    put("vm.pause", "Stops the vCPUs where they are"),
    put("vm.resume", "Lets a paused VM go on"),
    put("vm.shutdown", "Ends the VM, which stays configured"),
    put("vm.reboot", "Ends the VM and starts it again"),
    put("vm.power-button", "Presses the power button"),
    put("vm.nmi", "Sends an NMI to all vCPUs"),
    put("vm.resize", "Changes vCPUs, memory or balloon").taking(of::<VmResize>),
    put("vm.resize-disk", "Changes the size of a disk").taking(of::<VmResizeDisk>),
    put("vm.resize-zone", "Changes the size of a memory zone").taking(of::<VmResizeZone>),
    put("vm.add-device", "Adds a host device").adding(of::<DeviceConfig>),
    put("vm.add-disk", "Adds a disk").adding(of::<DiskConfig>),
    put("vm.add-fs", "Adds a shared file system").adding(of::<FsConfig>),
    put("vm.add-generic-vhost-user", "Adds a generic vhost-user device").adding(anything),
    put(
        "vm.add-net",
        "Adds a network device; its taps may come as descriptors with the request",
    )
    .adding(of::<NetConfig>),
    put("vm.add-pmem", "Adds persistent memory").adding(of::<PmemConfig>),
    put("vm.add-user-device", "Adds a vfio-user device").adding(anything),
    put("vm.add-vdpa", "Adds a vDPA device").adding(anything),
    put("vm.add-vsock", "Adds the socket device").adding(of::<VsockConfig>),
    put("vm.remove-device", "Asks the guest to let go of a device").taking(of::<VmRemoveDevice>),
    put("vm.snapshot", "Saves a paused VM").taking(of::<VmSnapshotConfig>),
    put("vm.restore", "Makes a VM from what was saved").taking(of::<RestoreConfig>),
    put("vm.coredump", "Writes the guest's memory as a core file").taking(anything),
    put("vm.receive-migration", "Waits for a VM to be sent").taking(anything),
    put("vm.send-migration", "Sends the VM to another monitor").taking(anything),
];

/// What went wrong, by status: its name in the document, what it says.
const REFUSALS: &[(&str, &str, &str)] = &[
    (
        "400",
        "Invalid",
        "The request cannot be: the causes name the field and its value",
    ),
    ("404", "Absent", "There is no VM, or no such device"),
    (
        "409",
        "Conflict",
        "The VM's state, or what it has already, does not allow it",
    ),
    ("500", "Failed", "It was tried and failed"),
    ("501", "Unsupported", "This version does not do that"),
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

fn responses(success: Success, generator: &mut SchemaGenerator) -> Value {
    let mut all = Map::new();
    let mut add = |status: &str, description: &str, schema: Option<Schema>| {
        let mut response = json!({ "description": description });
        if let (Some(schema), Some(response)) = (schema, response.as_object_mut()) {
            response.insert("content".to_owned(), content(schema.as_value()));
        }
        all.insert(status.to_owned(), response);
    };
    match success {
        Success::Nothing => add("204", "Done", None),
        Success::Empty => add("200", "Done", None),
        Success::Body(schema) => add("200", "The answer", Some(schema(generator))),
        Success::Device => {
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
        "responses": responses(endpoint.success, generator),
    });
    if let (Some(body), Some(operation)) = (endpoint.body, operation.as_object_mut()) {
        let schema = body(generator);
        operation.insert(
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
        paths.insert(format!("/{}", endpoint.name), json!({ endpoint.method: operation }));
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
