//! Measures prompt text while JSON is parsed, without keeping any of it.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Bytes of text per token, the usual rule of thumb for English.
const BYTES_PER_TOKEN: u64 = 4;
/// Fields of a message or content part with text that a model reads.
const TEXT_FIELDS: [&str; 6] = ["content", "text", "input", "output", "arguments", "refusal"];

/// The kind of a measured JSON value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    #[default]
    Null,
    /// A number: one token id in a prompt that came tokenised.
    Number,
    Text,
    List,
    Object,
}

/// The size of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Measured {
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    /// The number of prompts: the elements of a list, except that a list of token ids is one prompt.
    pub(crate) items: usize,
}

impl Measured {
    pub(crate) fn tokens(&self) -> u64 {
        (self.bytes / BYTES_PER_TOKEN).max(1)
    }
}

impl<'de> Deserialize<'de> for Measured {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Measure)
    }
}

struct Measure;

impl Measure {
    fn number() -> Measured {
        Measured { kind: Kind::Number, bytes: BYTES_PER_TOKEN, items: 1 }
    }
}

impl<'de> Visitor<'de> for Measure {
    type Value = Measured;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a list or an object")
    }

    fn visit_str<E>(self, text: &str) -> Result<Measured, E> {
        Ok(Measured { kind: Kind::Text, bytes: text.len() as u64, items: 1 })
    }

    fn visit_u64<E>(self, _: u64) -> Result<Measured, E> {
        Ok(Self::number())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Measured, E> {
        Ok(Self::number())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Measured, E> {
        Ok(Self::number())
    }

    fn visit_bool<E>(self, _: bool) -> Result<Measured, E> {
        Ok(Measured::default())
    }

    fn visit_unit<E>(self) -> Result<Measured, E> {
        Ok(Measured::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Measured, A::Error> {
        let mut total = Measured { kind: Kind::List, ..Measured::default() };
        let mut numbers_only = true;
        while let Some(element) = list.next_element::<Measured>()? {
            numbers_only &= element.kind == Kind::Number;
            total.bytes += element.bytes;
            total.items += 1;
        }
        if numbers_only {
            total.items = total.items.min(1);
        }
        Ok(total)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Measured, A::Error> {
        let mut total = Measured { kind: Kind::Object, bytes: 0, items: 1 };
        while let Some(Field(is_text)) = object.next_key()? {
            if is_text {
                total.bytes += object.next_value::<Measured>()?.bytes;
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        Ok(total)
    }
}

/// Whether a field holds text, found without allocating its name.
struct Field(bool);

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Field;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }
            fn visit_str<E>(self, name: &str) -> Result<Field, E> {
                Ok(Field(TEXT_FIELDS.contains(&name)))
            }
        }
        deserializer.deserialize_identifier(Name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(json: &str) -> (u64, usize) {
        let measured: Measured = serde_json::from_str(json).unwrap();
        (measured.tokens(), measured.items)
    }

    #[test]
    fn text_is_counted_wherever_messages_carry_it() {
        assert_eq!(measure(r#""12345678""#), (2, 1));
        assert_eq!(measure(r#"[{"role":"user","content":"12345678"}]"#), (2, 1));
        let parts =
            r#"[{"role":"user","content":[{"type":"text","text":"1234"},{"type":"x","text":"1234"}]}]"#;
        assert_eq!(measure(parts), (2, 1));
        assert_eq!(measure(r#"[{"role":"assistant","content":null,"name":"long name here"}]"#), (1, 1));
    }

    #[test]
    fn token_ids_are_one_prompt_and_one_token_each() {
        assert_eq!(measure("[1,2,3]"), (3, 1));
        assert_eq!(measure("[[1,2,3],[4]]"), (4, 2));
        assert_eq!(measure(r#"["abcd","efgh","ijkl"]"#), (3, 3));
    }

    #[test]
    fn nothing_is_still_one_token() {
        assert_eq!(measure(r#""""#), (1, 1));
        assert_eq!(measure("[]"), (1, 0));
    }
}
