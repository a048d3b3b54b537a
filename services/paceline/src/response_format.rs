//! Flags that say what a generated text must be, and what they are on the wire. Files are read here; whether a schema or
//! grammar is good is the coordinator's matter.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use paceline_wire::inference::{JsonObject, ResponseFormat, response_format::Format};

/// What the text must be, from its first to its last character; at most one of these.
#[derive(Args, Clone, Debug, Default)]
#[group(multiple = false)]
pub struct ResponseFormatArgs {
    /// The text is a JSON object
    #[arg(long, help_heading = "Response format")]
    pub json_object: bool,
    /// The text is JSON that the JSON schema in this file allows
    #[arg(long, value_name = "FILE", help_heading = "Response format")]
    pub json_schema: Option<PathBuf>,
    /// The text matches this regular expression as a whole (the syntax of Rust's regex crate, without look-around)
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true, help_heading = "Response format")]
    pub regex: Option<String>,
    /// The text is one of the grammar in this file, in Lark's notation; it begins with the rule `start`
    #[arg(long, value_name = "FILE", help_heading = "Response format")]
    pub lark: Option<PathBuf>,
}

impl ResponseFormatArgs {
    /// For the wire; nothing when any text will do.
    ///
    /// # Errors
    /// When a file cannot be read, or a schema is no JSON.
    pub fn response_format(&self) -> anyhow::Result<Option<ResponseFormat>> {
        let format = match self {
            Self { json_object: true, .. } => Format::JsonObject(JsonObject {}),
            Self { json_schema: Some(path), .. } => Format::JsonSchema(schema(path)?),
            Self { regex: Some(regex), .. } => Format::Regex(regex.clone()),
            Self { lark: Some(path), .. } => Format::Lark(text(path)?),
            _ => return Ok(None),
        };
        Ok(Some(ResponseFormat { format: Some(format) }))
    }
}

fn text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// As it is written: the order of its properties is that of the text.
fn schema(path: &Path) -> anyhow::Result<String> {
    let text = text(path)?;
    serde_json::from_str::<serde::de::IgnoredAny>(&text)
        .with_context(|| format!("the JSON schema {} is not JSON", path.display()))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        format: ResponseFormatArgs,
    }

    fn parsed(arguments: &[&str]) -> Result<ResponseFormatArgs, clap::Error> {
        Ok(Command::try_parse_from(["x"].iter().chain(arguments))?.format)
    }

    fn format(arguments: &[&str]) -> Result<Option<Format>, String> {
        let format = parsed(arguments).expect("flags").response_format();
        format.map(|format| format.and_then(|format| format.format)).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn each_flag_is_a_format_and_two_are_refused() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("writes");
            path.to_string_lossy().into_owned()
        };
        let (schema, lark) = (file("a.json", "{\"type\": \"integer\"}\n"), file("b.lark", "start: \"yes\""));
        assert_eq!(format(&[]), Ok(None));
        assert_eq!(format(&["--json-object"]), Ok(Some(Format::JsonObject(JsonObject {}))));
        let expected = Format::JsonSchema("{\"type\": \"integer\"}\n".into());
        assert_eq!(format(&["--json-schema", &schema]), Ok(Some(expected)));
        assert_eq!(format(&["--regex", "-?[0-9]+"]), Ok(Some(Format::Regex("-?[0-9]+".into()))));
        assert_eq!(format(&["--lark", &lark]), Ok(Some(Format::Lark("start: \"yes\"".into()))));
        let both = parsed(&["--json-object", "--regex", "a"]).expect_err("one or the other").to_string();
        assert!(both.contains("--json-object") && both.contains("--regex"), "{both}");
    }

    #[test]
    fn files_that_are_not_there_or_no_json_are_named() {
        let missing = format(&["--lark", "/nowhere/a.lark"]).expect_err("no file");
        assert!(missing.contains("cannot read /nowhere/a.lark"), "{missing}");
        let folder = tempfile::TempDir::new().expect("a folder");
        let path = folder.path().join("a.json");
        std::fs::write(&path, "{\"type\": ").expect("writes");
        let broken = format(&["--json-schema", &path.to_string_lossy()]).expect_err("no JSON");
        assert!(broken.contains("a.json is not JSON"), "{broken}");
    }
}
