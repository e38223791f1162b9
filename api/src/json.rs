//! From the bytes of a request body to a typed request: bounded (a document may not have more values than any real
//! request has, whatever its bytes), null means absent, a key given twice is refused, unknown keys are ignored.

use crate::node::{FieldError, Node};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

/// Values (of any depth) that one document may have: far above any real configuration, and what keeps the memory of a
/// hostile 4 MiB body within a few times its size.
const MAX_VALUES: usize = 65_536;

/// Why a body was refused.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// It is no JSON, or has too many values, or the same key twice.
    #[error("the body is no acceptable JSON: {0}")]
    Syntax(#[from] serde_json::Error),
    /// It is JSON, but a field has the wrong type, an unknown word or is missing.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// Parses a JSON document of the API's schema.
///
/// Nulls count as absent, unknown keys are ignored, a key given twice is refused.
///
/// # Errors
/// [`JsonError`]: with line and column for bad syntax, with the path of the field for bad values.
pub fn from_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, JsonError> {
    let budget = Cell::new(MAX_VALUES);
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let node = Builder(&budget).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(T::deserialize(node)?)
}

#[derive(Clone, Copy)]
struct Builder<'b>(&'b Cell<usize>);

impl<'de> DeserializeSeed<'de> for Builder<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        let left = self.0.get().checked_sub(1);
        let left =
            left.ok_or_else(|| D::Error::custom(format_args!("more than {MAX_VALUES} values in one document")))?;
        self.0.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Builder<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
        Ok(Node::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
        Ok(Node::Unsigned(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
        Ok(Node::Signed(v))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Node, E> {
        Ok(Node::Float(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Node, E> {
        Ok(Node::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Node, E> {
        Ok(Node::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self)?;
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "the key `{key}` is given twice; give it once"
                )));
            }
            fields.insert(key, value);
        }
        // Kept until here, so that a null does not hide a second value of the same key.
        fields.retain(|_, value| *value != Node::Null);
        Ok(Node::Map(fields))
    }
}
