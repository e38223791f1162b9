//! The tree between the two spellings of a configuration (JSON and `k=v,k=v`) and the types: one serde deserializer for
//! both, which knows where in the document it is, so that every error names its field. JSON values keep their type;
//! option text gets one from the field it is meant for (`on` a bool, `512M` a size).

use crate::options;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use std::collections::{BTreeMap, btree_map};
use std::fmt;

/// A value of a request before it has a type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    /// An explicit `null` where dropping it would shift positions (in an array).
    Null,
    /// A JSON boolean.
    Bool(bool),
    /// A JSON integer of 0 or more.
    Unsigned(u64),
    /// A JSON integer below 0.
    Signed(i64),
    /// Any other JSON number.
    Float(f64),
    /// A JSON string.
    String(String),
    /// An option given by its bare name (`readonly`).
    Flag,
    /// The text of an option's value.
    Text(String),
    /// A JSON array.
    List(Vec<Node>),
    /// A JSON object: keys that no field claims are ignored, as Cloud Hypervisor ignores them.
    Map(BTreeMap<String, Node>),
    /// `k=v,…` of the command line: keys that no field claims are errors.
    Options(BTreeMap<String, Node>),
}

/// Why a document does not fit its type: where, and what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{reason}", self.field(), if self.path.is_empty() { "" } else { ": " })]
pub struct FieldError {
    path: Vec<String>,
    reason: String,
}

impl FieldError {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self {
            path: Vec::new(),
            reason: reason.into(),
        }
    }

    /// The dotted path of the field at fault (`disks[1].queue_size`), empty for the document itself.
    pub fn field(&self) -> String {
        let mut text = String::new();
        for step in self.path.iter().rev() {
            if !text.is_empty() && !step.starts_with('[') {
                text.push('.');
            }
            text.push_str(step);
        }
        text
    }

    pub(crate) fn within(mut self, step: impl Into<String>) -> Self {
        self.path.push(step.into());
        self
    }
}

impl de::Error for FieldError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }
}

/// An integer as option text: decimal or 0x hexadecimal, with an optional binary suffix K, M, G or T (Cloud
/// Hypervisor's spelling of sizes on the command line).
pub(crate) fn parse_size(text: &str) -> Result<u64, FieldError> {
    let trimmed = text.trim();
    let (digits, shift) = match trimmed.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (trimmed.get(..at), 10),
        Some((at, 'M' | 'm')) => (trimmed.get(..at), 20),
        Some((at, 'G' | 'g')) => (trimmed.get(..at), 30),
        Some((at, 'T' | 't')) => (trimmed.get(..at), 40),
        _ => (Some(trimmed), 0),
    };
    let digits = digits.unwrap_or_default();
    let parsed = match digits.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        None if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    };
    parsed.and_then(|n: u64| n.checked_mul(1u64 << shift)).ok_or_else(|| {
        FieldError::new(format!(
            "`{text}` is no whole number below 2^64, with K, M, G or T after it if wanted"
        ))
    })
}

fn parse_toggle(text: &str) -> Result<bool, FieldError> {
    match text.trim() {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        other => Err(FieldError::new(format!("`{other}` is none of on, off, true, false"))),
    }
}

fn same_word(a: &str, b: &str) -> bool {
    let plain = |s: &str| {
        s.bytes()
            .filter(|c| !matches!(c, b'-' | b'_'))
            .map(|c| c.to_ascii_lowercase())
            .collect::<Vec<_>>()
    };
    plain(a) == plain(b)
}

macro_rules! deserialize_sized {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
            match self {
                Node::Text(text) => match text.trim().strip_prefix('-') {
                    Some(digits) => match i64::try_from(parse_size(digits)?) {
                        Ok(n) => visitor.visit_i64(-n),
                        Err(_) => Err(FieldError::new(format!("`{text}` is below -2^63"))),
                    },
                    None => visitor.visit_u64(parse_size(&text)?),
                },
                other => other.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Node {
    type Error = FieldError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        match self {
            Node::Null => visitor.visit_unit(),
            Node::Bool(b) => visitor.visit_bool(b),
            Node::Flag => visitor.visit_bool(true),
            Node::Unsigned(n) => visitor.visit_u64(n),
            Node::Signed(n) => visitor.visit_i64(n),
            Node::Float(n) => visitor.visit_f64(n),
            Node::String(s) | Node::Text(s) => visitor.visit_string(s),
            Node::List(items) => visitor.visit_seq(Items {
                items: items.into_iter(),
                index: 0,
            }),
            Node::Map(map) | Node::Options(map) => visitor.visit_map(Entries {
                entries: map.into_iter(),
                value: None,
            }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        match self {
            Node::Text(text) => visitor.visit_bool(parse_toggle(&text)?),
            other => other.deserialize_any(visitor),
        }
    }

    deserialize_sized!(deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64);

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        match self {
            Node::Null => visitor.visit_none(),
            other => visitor.visit_some(other),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, FieldError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        match self {
            Node::Text(text) => Node::List(options::list(&text)?).deserialize_any(visitor),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        match self {
            Node::Text(text) => Node::Options(options::nested(&text)?).deserialize_struct("", fields, visitor),
            Node::Options(map) => {
                if let Some(key) = map.keys().find(|key| !fields.contains(&key.as_str())) {
                    return Err(
                        FieldError::new(format!("no such option; accepted are {}", fields.join(", ")))
                            .within(key.as_str()),
                    );
                }
                Node::Options(map).deserialize_any(visitor)
            }
            // serde would take the items of a list for the fields in their order.
            list @ Node::List(_) => Err(de::Error::invalid_type(list.unexpected(), &"an object")),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        match self {
            Node::String(word) => visitor.visit_enum(Word(word)),
            Node::Text(word) => match variants.iter().find(|known| same_word(known, &word)) {
                Some(known) => visitor.visit_enum(Word((*known).to_owned())),
                None => Err(FieldError::new(format!("`{word}` is none of {}", variants.join(", ")))),
            },
            other => Err(de::Error::invalid_type(
                other.unexpected(),
                &format!("one of {}", variants.join(", ")).as_str(),
            )),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map identifier
    }
}

impl Node {
    fn unexpected(&self) -> de::Unexpected<'_> {
        match self {
            Node::Null => de::Unexpected::Unit,
            Node::Bool(b) => de::Unexpected::Bool(*b),
            Node::Flag => de::Unexpected::Other("nothing"),
            Node::Unsigned(n) => de::Unexpected::Unsigned(*n),
            Node::Signed(n) => de::Unexpected::Signed(*n),
            Node::Float(n) => de::Unexpected::Float(*n),
            Node::String(s) | Node::Text(s) => de::Unexpected::Str(s),
            Node::List(_) => de::Unexpected::Seq,
            Node::Map(_) | Node::Options(_) => de::Unexpected::Map,
        }
    }
}

struct Items {
    items: std::vec::IntoIter<Node>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = FieldError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, FieldError> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let index = self.index;
        self.index += 1;
        seed.deserialize(item)
            .map(Some)
            .map_err(|e| e.within(format!("[{index}]")))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries {
    entries: btree_map::IntoIter<String, Node>,
    value: Option<(String, Node)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = FieldError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, FieldError> {
        let Some((key, value)) = self.entries.next() else {
            return Ok(None);
        };
        let parsed = seed.deserialize(key.as_str().into_deserializer());
        self.value = Some((key, value));
        parsed.map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, FieldError> {
        match self.value.take() {
            Some((key, value)) => seed.deserialize(value).map_err(|e| e.within(key)),
            None => Err(FieldError::new("a value was asked for before its key")),
        }
    }
}

struct Word(String);

impl<'de> EnumAccess<'de> for Word {
    type Error = FieldError;
    type Variant = Bare;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Bare), FieldError> {
        seed.deserialize(self.0.into_deserializer()).map(|v| (v, Bare))
    }
}

struct Bare;

impl<'de> VariantAccess<'de> for Bare {
    type Error = FieldError;

    fn unit_variant(self) -> Result<(), FieldError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, FieldError> {
        Err(FieldError::new("a bare word holds no value"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, FieldError> {
        Err(FieldError::new("a bare word holds no values"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, FieldError> {
        Err(FieldError::new("a bare word holds no fields"))
    }
}
