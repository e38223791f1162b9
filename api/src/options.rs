//! The command line's spelling of the wire types: `path=/x,readonly=on,queues=[0,1]`, as Cloud Hypervisor's and
//! ch-remote's options are written. The types are those of the REST API; this file only turns the text into the tree that
//! they are read from. Lists are `[a,b]`, structures `<k=v,k=v>`, quotes keep commas and brackets literal.

use crate::node::{FieldError, Node};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Why an option's text was refused: names the key, the value and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Brackets or quotes do not pair up.
    #[error("`{text}`: {reason}")]
    Syntax {
        /// The text as given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key is given twice.
    #[error("`{key}` is given twice; give it once")]
    Twice {
        /// The key.
        key: String,
    },
    /// A key or value does not fit the option.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// A wire type that can be written as an option on the command line.
pub trait OptionForm: DeserializeOwned {
    /// Rewrites spellings that only the command line has (`topology=1:2:1:1`, a bare `tty`) into the schema's.
    ///
    /// # Errors
    /// A value that is not in the shape which the spelling demands.
    fn rewrite(_options: &mut OptionMap) -> Result<(), FieldError> {
        Ok(())
    }
}

/// The keys and values of one option before they have types.
#[derive(Debug, Default)]
pub struct OptionMap(BTreeMap<String, Node>);

impl OptionMap {
    /// Takes a key out if it has been given with a value.
    pub(crate) fn take_text(&mut self, key: &str) -> Option<String> {
        match self.0.remove(key) {
            Some(Node::Text(text)) => Some(text),
            Some(other) => {
                self.0.insert(key.to_owned(), other);
                None
            }
            None => None,
        }
    }

    /// Takes a bare word out; whether it was there.
    pub(crate) fn take_flag(&mut self, key: &str) -> bool {
        let there = matches!(self.0.get(key), Some(Node::Flag));
        if there {
            self.0.remove(key);
        }
        there
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn set(&mut self, key: &str, value: Node) {
        self.0.insert(key.to_owned(), value);
    }

    /// Moves `bw_size`, `bw_one_time_burst`, `bw_refill_time` and the `ops_` three into `rate_limiter_config`.
    pub(crate) fn nest_rate_limiter(&mut self) {
        let mut limiter = BTreeMap::new();
        for (prefix, bucket) in [("bw_", "bandwidth"), ("ops_", "ops")] {
            let fields: BTreeMap<String, Node> = ["size", "one_time_burst", "refill_time"]
                .into_iter()
                .filter_map(|field| Some((field.to_owned(), self.0.remove(&format!("{prefix}{field}"))?)))
                .collect();
            if !fields.is_empty() {
                limiter.insert(bucket.to_owned(), Node::Options(fields));
            }
        }
        if !limiter.is_empty() {
            self.set("rate_limiter_config", Node::Options(limiter));
        }
    }
}

/// Parses one option's text into its wire type.
///
/// # Errors
/// [`OptionsError`], naming the key, the value and the accepted ones.
pub fn from_options<T: OptionForm>(text: &str) -> Result<T, OptionsError> {
    let mut map = OptionMap(pairs(text)?);
    T::rewrite(&mut map)?;
    Ok(T::deserialize(Node::Options(map.0))?)
}

/// As [`from_options`], with the descriptors that `fd=3` or `fd=[3,4]` names beside the type's own keys: they are the
/// process's and not part of what is sent.
///
/// # Errors
/// As [`from_options`].
pub fn from_options_with_fds<T: OptionForm>(text: &str) -> Result<(T, Vec<i32>), OptionsError> {
    let mut map = OptionMap(pairs(text)?);
    let fds = map.take_text("fd").map_or(Ok(Vec::new()), |text| {
        let numbers: Result<Vec<i32>, FieldError> = list(&text)?.into_iter().map(fd).collect();
        numbers
    });
    let fds = fds.map_err(|e| e.within("fd"))?;
    T::rewrite(&mut map)?;
    Ok((T::deserialize(Node::Options(map.0))?, fds))
}

/// One option's text as a JSON object, for a structure of which there is no type here: `on`, `off`, `true` and `false` are
/// switches, digits are numbers, `[a,b]` is a list, and all else is text.
///
/// # Errors
/// [`OptionsError::Syntax`] and [`OptionsError::Twice`].
pub fn object_from_options(text: &str) -> Result<serde_json::Map<String, serde_json::Value>, OptionsError> {
    let value = |node| -> Result<serde_json::Value, OptionsError> {
        Ok(match node {
            Node::Text(text) if text.starts_with('[') => list(&text)?.iter().map(json_scalar).collect(),
            other => json_scalar(&other),
        })
    };
    let pairs = pairs(text)?.into_iter();
    pairs.map(|(key, node)| Ok((key, value(node)?))).collect()
}

fn json_scalar(node: &Node) -> serde_json::Value {
    match node {
        Node::Text(text) => match text.as_str() {
            "on" | "true" => true.into(),
            "off" | "false" => false.into(),
            text => text.parse::<u64>().map_or_else(|_| text.into(), Into::into),
        },
        _ => true.into(),
    }
}

fn fd(node: Node) -> Result<i32, FieldError> {
    match node {
        Node::Text(text) => match text.parse() {
            Ok(number) if number > 2 => Ok(number),
            _ => Err(FieldError::new(format!(
                "`{text}` is no inherited descriptor; give numbers above 2"
            ))),
        },
        _ => Err(FieldError::new("no number; write fd=3 or fd=[3,4]".to_owned())),
    }
}

/// Splits at the commas that stand outside quotes and brackets; quotes are removed where nothing further will be split
/// off the piece (`keep_quotes` false).
fn split(text: &str, keep_quotes: bool) -> Result<Vec<String>, OptionsError> {
    let refuse = |reason| OptionsError::Syntax {
        text: text.to_owned(),
        reason,
    };
    let (mut pieces, mut piece, mut open, mut quoted) = (Vec::new(), String::new(), Vec::new(), false);
    for c in text.trim().chars() {
        match c {
            '"' => {
                quoted = !quoted;
                // Inside brackets the quotes are still needed when the brackets' content is split in its turn.
                if !keep_quotes && open.is_empty() {
                    continue;
                }
            }
            '[' | '<' if !quoted => open.push(c),
            ']' | '>' if !quoted && open.pop() != Some(if c == ']' { '[' } else { '<' }) => {
                return Err(refuse(
                    "a bracket is closed that was not opened; quote it if it is part of a value",
                ));
            }
            ',' if !quoted && open.is_empty() => {
                pieces.push(std::mem::take(&mut piece));
                continue;
            }
            _ => {}
        }
        piece.push(c);
    }
    if quoted {
        return Err(refuse("a quote is not closed"));
    }
    if !open.is_empty() {
        return Err(refuse("a bracket is not closed"));
    }
    pieces.push(piece);
    Ok(pieces)
}

fn pairs(text: &str) -> Result<BTreeMap<String, Node>, OptionsError> {
    let mut map = BTreeMap::new();
    if text.trim().is_empty() {
        return Ok(map);
    }
    for piece in split(text, false)? {
        let (key, value) = match piece.split_once('=') {
            Some((key, value)) => (key.trim(), Node::Text(value.trim().to_owned())),
            None => (piece.trim(), Node::Flag),
        };
        if key.is_empty() {
            return Err(OptionsError::Syntax {
                text: text.to_owned(),
                reason: "a key is missing; write key=value,key=value",
            });
        }
        if map.insert(key.to_owned(), value).is_some() {
            return Err(OptionsError::Twice { key: key.to_owned() });
        }
    }
    Ok(map)
}

/// The elements of `[a,b]`, or of a bare `a`.
pub(crate) fn list(text: &str) -> Result<Vec<Node>, FieldError> {
    let inner = match text.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(inner)) => inner,
        Some(None) => return Err(FieldError::new(format!("`{text}` is no list; write [a,b]"))),
        None => text,
    };
    if inner.trim().is_empty() {
        return Ok(Vec::new());
    }
    let pieces = split(inner, false).map_err(|e| FieldError::new(e.to_string()))?;
    Ok(pieces
        .into_iter()
        .map(|piece| Node::Text(piece.trim().to_owned()))
        .collect())
}

/// The fields of `<k=v,k=v>`.
pub(crate) fn nested(text: &str) -> Result<BTreeMap<String, Node>, FieldError> {
    let inner = text.strip_prefix('<').and_then(|rest| rest.strip_suffix('>'));
    let inner =
        inner.ok_or_else(|| FieldError::new(format!("`{text}` is no structure; write <key=value,key=value>")))?;
    pairs(inner).map_err(|e| FieldError::new(e.to_string()))
}

#[cfg(test)]
mod tests;
