//! The `tojson` filter of chat templates: what Python's `json.dumps` writes. It is no general serializer.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// The arguments of `json.dumps` that templates use.
struct Style {
    item_separator: String,
    key_separator: String,
    /// Spaces for each level; `None` is everything on one line.
    indent: Option<usize>,
    escapes_non_ascii: bool,
    sorts_keys: bool,
}

struct Writer {
    style: Style,
    json: String,
    limit: usize,
}

/// Writes `value` as JSON of at most `limit` bytes. Keyword arguments: `indent`, `ensure_ascii`, `separators`,
/// `sort_keys`.
pub(crate) fn tojson(value: &Value, arguments: &Kwargs, limit: usize) -> Result<Value, Error> {
    let style = Style::from_arguments(arguments)?;
    arguments.assert_all_used()?;
    let mut writer = Writer { style, json: String::new(), limit };
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.json))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {}", message.into()))
}

impl Style {
    fn from_arguments(arguments: &Kwargs) -> Result<Self, Error> {
        let indent: Option<usize> = arguments.get("indent")?;
        let separators: Option<Vec<String>> = arguments.get("separators")?;
        let (item_separator, key_separator) = match separators.as_deref() {
            None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
            Some([item, key]) => (item.clone(), key.clone()),
            Some(other) => return Err(invalid(format!("separators are 2 strings, not {}", other.len()))),
        };
        let flag = |name| Ok::<_, Error>(arguments.get::<Option<bool>>(name)?.unwrap_or(false));
        let (escapes_non_ascii, sorts_keys) = (flag("ensure_ascii")?, flag("sort_keys")?);
        Ok(Self { item_separator, key_separator, indent, escapes_non_ascii, sorts_keys })
    }
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                for (i, item) in value.try_iter()?.enumerate() {
                    self.separate(i, depth + 1)?;
                    self.value(&item, depth + 1)?;
                }
                self.close("]", value, depth)
            }
            ValueKind::Map => {
                self.push("{")?;
                for (i, (name, key)) in self.keys(value)?.into_iter().enumerate() {
                    self.separate(i, depth + 1)?;
                    self.string(&name)?;
                    let key_separator = self.style.key_separator.clone();
                    self.push(&key_separator)?;
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close("}", value, depth)
            }
            kind => Err(invalid(format!("a value of kind {kind} has no JSON"))),
        }
    }

    /// Keys as they are written, with the keys themselves.
    fn keys(&self, map: &Value) -> Result<Vec<(String, Value)>, Error> {
        let mut keys = Vec::new();
        for key in map.try_iter()? {
            let name = match key.kind() {
                ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                ValueKind::None => "null".to_owned(),
                ValueKind::Bool => (if key.is_true() { "true" } else { "false" }).to_owned(),
                ValueKind::Number => number(&key)?,
                kind => return Err(invalid(format!("a key of kind {kind} has no JSON"))),
            };
            keys.push((name, key));
        }
        if self.style.sorts_keys {
            keys.sort_by(|(left, _), (right, _)| left.cmp(right));
        }
        Ok(keys)
    }

    /// What stands before item `i`.
    fn separate(&mut self, i: usize, depth: usize) -> Result<(), Error> {
        if i > 0 {
            let separator = self.style.item_separator.clone();
            self.push(&separator)?;
        }
        self.new_line(depth)
    }

    fn close(&mut self, bracket: &str, container: &Value, depth: usize) -> Result<(), Error> {
        if container.len() != Some(0) {
            self.new_line(depth)?;
        }
        self.push(bracket)
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.style.indent else { return Ok(()) };
        self.push("\n")?;
        let n_spaces = indent.saturating_mul(depth);
        self.check(n_spaces)?;
        self.json.extend(std::iter::repeat_n(' ', n_spaces));
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.push("\"")?;
        for character in text.chars() {
            match character {
                '"' => self.push("\\\"")?,
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\u{8}' => self.push("\\b")?,
                '\u{c}' => self.push("\\f")?,
                '\0'..='\u{1f}' => self.escape(character)?,
                ' '..='~' => self.push(character.encode_utf8(&mut [0; 4]))?,
                _ if self.style.escapes_non_ascii => self.escape(character)?,
                _ => self.push(character.encode_utf8(&mut [0; 4]))?,
            }
        }
        self.push("\"")
    }

    fn escape(&mut self, character: char) -> Result<(), Error> {
        for unit in character.encode_utf16(&mut [0; 2]) {
            self.push(&format!("\\u{unit:04x}"))?;
        }
        Ok(())
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.check(text.len())?;
        self.json.push_str(text);
        Ok(())
    }

    fn check(&self, n_more: usize) -> Result<(), Error> {
        if n_more > self.limit - self.json.len() {
            return Err(invalid(format!("more than {} bytes", self.limit)));
        }
        Ok(())
    }
}

/// A number as Python writes it: integers in full, floats by the shortest digits that read back, with an exponent of
/// two digits and a sign outside 1e-4 ..= 1e16.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let float = f64::try_from(value.clone())?;
    if float.is_nan() {
        return Ok("NaN".to_owned());
    }
    if float.is_infinite() {
        return Ok(if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned());
    }
    let shortest = format!("{float:?}");
    let Some((mantissa, exponent)) = shortest.split_once('e') else { return Ok(shortest) };
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    Ok(format!("{mantissa}e{sign}{digits:0>2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: Value, arguments: &[(&'static str, Value)]) -> Result<String, Error> {
        let arguments: Kwargs = arguments.iter().cloned().collect();
        tojson(&value, &arguments, 1000).map(|json| json.to_string())
    }

    #[test]
    fn numbers_are_written_as_python_does() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-300, "1.5e-300"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.2345e22, "1.2345e+22"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (float, expected) in cases {
            assert_eq!(json(Value::from(float), &[]).unwrap(), expected);
        }
        assert_eq!(json(Value::from(u64::MAX), &[]).unwrap(), "18446744073709551615");
    }

    #[test]
    fn escapes() {
        let text = Value::from("\0\u{8}\u{c}\n\r\t\"\\/\u{7f}é😀\u{2028}</s>");
        let plain = "\"\\u0000\\b\\f\\n\\r\\t\\\"\\\\/\u{7f}é😀\u{2028}</s>\"";
        assert_eq!(json(text.clone(), &[]).unwrap(), plain);
        let ascii = r#""\u0000\b\f\n\r\t\"\\/\u007f\u00e9\ud83d\ude00\u2028</s>""#;
        assert_eq!(json(text, &[("ensure_ascii", true.into())]).unwrap(), ascii);
    }

    #[test]
    fn too_much_is_refused() {
        let nested = (0..=MAX_DEPTH + 1).fold(Value::from(1), |inner, _| Value::from(vec![inner]));
        assert!(json(nested, &[]).unwrap_err().to_string().contains("deeper than 64"));
        let list = Value::from(vec![1, 2]);
        let huge = json(list.clone(), &[("indent", usize::MAX.into())]).unwrap_err().to_string();
        assert!(huge.contains("more than 1000 bytes"), "{huge}");
        assert!(json(list.clone(), &[("nonsense", 1.into())]).is_err());
        assert!(json(list, &[("separators", vec![","].into())]).is_err());
        assert!(json(Value::UNDEFINED, &[]).is_err());
    }
}
