//! The rules of the house that a program can check. It reads sources and manifests; nothing is built or run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use toml::Table;

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_ARCHITECTURE_LINES: usize = 200;
const MAX_MAIN_LINES: usize = 60;
/// Files and folders of the root; dot-files and build output aside.
const ROOT: [&str; 9] = [
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "deploy",
    "proto",
    "services",
    "shared",
];
/// Crates that may contain `unsafe`.
const UNSAFE_CRATES: [&str; 4] = ["shared/kernels", "shared/collectives", "shared/checkpoint", "shared/cuda"];
/// Names that say nothing about what is in a file.
const EMPTY_NAMES: [&str; 6] = ["utils", "util", "helpers", "common", "misc", "part2"];

/// One crate of the workspace.
struct Crate {
    /// "shared/domain"
    dir: String,
    name: String,
    manifest: Table,
    /// Path in the repository and text of every Rust file.
    files: Vec<(String, String)>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the root").to_path_buf()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("lists").path()).collect();
    paths.sort();
    paths
}

fn files_below(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in list(dir) {
        if path.is_dir() {
            found.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned()
}

fn crates() -> Vec<Crate> {
    let groups = ["shared", "services"].map(|group| list(&root().join(group)));
    let dirs = groups.concat().into_iter().chain([root().join("tests")]);
    dirs.map(|dir| {
        let manifest: Table = read(&dir.join("Cargo.toml")).parse().expect("a manifest");
        let files = files_below(&dir, "rs");
        Crate {
            dir: relative(&dir),
            name: manifest["package"]["name"].as_str().expect("a name").into(),
            manifest,
            files: files.iter().map(|path| (relative(path), read(path))).collect(),
        }
    })
    .collect()
}

fn all_files() -> Vec<(String, String)> {
    crates().into_iter().flat_map(|krate| krate.files).collect()
}

#[track_caller]
fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn the_root_holds_what_it_should() {
    let mut allowed: BTreeSet<&str> = ROOT.into();
    allowed.extend(["tests", "target"]);
    let names = list(&root()).into_iter().map(|path| relative(&path));
    let surplus: Vec<String> =
        names.filter(|name| !name.starts_with('.') && !allowed.contains(&**name)).collect();
    assert_none(&surplus);
    ROOT.iter().for_each(|name| assert!(root().join(name).exists(), "{name} is missing"));
}

#[test]
fn every_file_says_what_it_is() {
    let silent = all_files().into_iter().filter(|(_, text)| !text.starts_with("//! "));
    assert_none(&silent.map(|(path, _)| format!("{path} does not begin with `//! `")).collect::<Vec<_>>());
}

#[test]
fn files_and_functions_are_short() {
    let mut problems = Vec::new();
    for (path, text) in all_files() {
        let n_lines = text.lines().count();
        if n_lines > MAX_FILE_LINES {
            problems.push(format!("{path} has {n_lines} lines; at most {MAX_FILE_LINES}"));
        }
        if path.starts_with("services/") && path.ends_with("src/main.rs") && n_lines > MAX_MAIN_LINES {
            problems.push(format!("{path} has {n_lines} lines; at most {MAX_MAIN_LINES}"));
        }
        for (name, n_lines) in long_functions(&text) {
            problems.push(format!("{path}: {name} has {n_lines} lines; at most {MAX_FUNCTION_LINES}"));
        }
    }
    assert_none(&problems);
}

/// Functions over the limit. Sources are formatted, so a function ends at the brace in the column it began in.
fn long_functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut long = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(at) = words.iter().position(|word| *word == "fn") else { continue };
        let modifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
        if !words[..at].iter().all(|word| modifiers.contains(word)) {
            continue;
        }
        let end = format!("{}}}", " ".repeat(indent));
        let length = lines[i..].iter().position(|line| **line == end).map_or(1, |length| length + 1);
        if length > MAX_FUNCTION_LINES && !line.trim_end().ends_with(';') {
            long.push((
                words.get(at + 1).unwrap_or(&"").split(['(', '<']).next().unwrap_or("").into(),
                length,
            ));
        }
    }
    long
}

#[test]
fn names_say_what_is_inside() {
    let mut problems = Vec::new();
    for (path, _) in all_files() {
        let stem = Path::new(&path).file_stem().expect("a name").to_string_lossy().into_owned();
        if EMPTY_NAMES.contains(&stem.as_str()) {
            problems.push(format!("{path}: the name says nothing"));
        }
    }
    assert_none(&problems);
}

/// Names of workspace crates in a table of dependencies.
fn workspace_dependencies(krate: &Crate, table: &str) -> Vec<String> {
    let dependencies = krate.manifest.get(table).and_then(|it| it.as_table());
    let names = dependencies.into_iter().flat_map(Table::keys);
    names.filter(|name| name.starts_with("paceline")).cloned().collect()
}

#[test]
fn arrows_point_from_services_to_shared_to_domain() {
    let crates = crates();
    let dir_of: BTreeMap<&str, &str> =
        crates.iter().map(|krate| (krate.name.as_str(), krate.dir.as_str())).collect();
    let mut problems = Vec::new();
    for krate in &crates {
        for dependency in workspace_dependencies(krate, "dependencies") {
            let dir = dir_of[dependency.as_str()];
            let cli_starts_services = krate.dir == "services/paceline";
            let allowed = match krate.dir.split('/').next().expect("a folder") {
                "shared" => dir.starts_with("shared/") && krate.name != "paceline-domain",
                "services" => {
                    dir.starts_with("shared/") || (cli_starts_services && dir.starts_with("services/"))
                }
                _ => true,
            };
            if !allowed {
                problems.push(format!("{} must not depend on {dependency}", krate.name));
            }
        }
        for async_crate in ["tokio", "tonic", "prost"] {
            let pure = ["paceline-domain", "paceline-kernels", "paceline-sampling", "paceline-model"];
            let depends = krate.manifest.get("dependencies").and_then(|it| it.get(async_crate)).is_some();
            if depends && pure.contains(&krate.name.as_str()) {
                problems.push(format!("{} must not depend on {async_crate}", krate.name));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn versions_and_lints_are_set_once() {
    let mut problems = Vec::new();
    for krate in crates() {
        let inherits =
            |table: &toml::Value| table.get("workspace").and_then(toml::Value::as_bool) == Some(true);
        if !krate.manifest.get("lints").is_some_and(inherits) {
            problems.push(format!("{}: [lints] workspace = true is missing", krate.dir));
        }
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let entries = krate.manifest.get(table).and_then(|it| it.as_table()).into_iter().flatten();
            let own = entries.filter(|(_, entry)| !inherits(entry));
            problems.extend(own.map(|(name, _)| format!("{}: {name} has a version of its own", krate.dir)));
        }
    }
    assert_none(&problems);
}

#[test]
fn unsafe_stays_where_it_is_allowed() {
    let mut problems = Vec::new();
    for krate in crates() {
        let roots: Vec<&(String, String)> =
            krate.files.iter().filter(|(path, _)| path.ends_with("src/lib.rs")).collect();
        for (path, text) in roots {
            if !UNSAFE_CRATES.contains(&krate.dir.as_str()) && !text.contains("#![forbid(unsafe_code)]") {
                problems.push(format!("{path} does not forbid unsafe code"));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_target_feature_function_is_named_in_a_test() {
    let mut problems = Vec::new();
    for krate in crates() {
        let in_tests: String = krate.files.iter().map(|(path, text)| test_part(path, text)).collect();
        for (path, text) in &krate.files {
            let untested = untested(&target_feature_functions(text), &in_tests);
            problems.extend(untested.iter().map(|name| format!("{path}: no test names {name}")));
        }
    }
    assert_none(&problems);
}

/// What is compiled for tests only: files of tests, or what follows an inline test module's `#[cfg(test)]`.
fn test_part<'a>(path: &str, text: &'a str) -> &'a str {
    let stem =
        Path::new(path).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    if path.contains("/tests/") || stem == "tests" || stem.ends_with("_tests") {
        return text;
    }
    let starts_module = |rest: &str| {
        let item = rest.lines().find(|line| !line.starts_with('#'));
        item.is_some_and(|item| item.starts_with("mod ") && item.ends_with('{'))
    };
    let mut starts = text.match_indices("#[cfg(test)]\n").map(|(start, _)| start);
    starts.find(|start| starts_module(&text[*start..])).map_or("", |start| &text[start..])
}

/// Name and body of every function with `#[target_feature]`.
fn target_feature_functions(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let attributes = (0..lines.len()).filter(|i| lines[*i].trim_start().starts_with("#[target_feature"));
    let function = |i: usize| {
        let start = (i..lines.len()).find(|i| lines[*i].contains("fn ") && !lines[*i].contains("//"))?;
        let name = lines[start].split("fn ").nth(1)?.split(['(', '<']).next()?.to_owned();
        let indent = lines[start].len() - lines[start].trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        let body = lines[start + 1..].iter().take_while(|line| ***line != end);
        Some((name, body.copied().collect::<Vec<_>>().join("\n")))
    };
    // In a macro the name is a parameter; its uses are seen where the macro is called.
    attributes.filter_map(function).filter(|(name, _)| !name.starts_with('$')).collect()
}

/// Functions that neither a test names nor a function that a test names calls.
fn untested(functions: &[(String, String)], in_tests: &str) -> BTreeSet<String> {
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect()
    };
    let mut named = words(in_tests);
    let mut untested: BTreeSet<String> = functions.iter().map(|(name, _)| name.clone()).collect();
    while let Some(name) = untested.iter().find(|name| named.contains(*name)).cloned() {
        untested.remove(&name);
        let bodies = functions.iter().filter(|(other, _)| *other == name);
        bodies.for_each(|(_, body)| named.extend(words(body)));
    }
    untested
}

#[test]
fn nothing_is_left_for_later() {
    // In two halves, so that this file does not find itself.
    let marks = ["TO\u{44}O", "FIX\u{4D}E", "#[ig\u{6E}ore", "to\u{64}o!(", "unimplemente\u{64}!("];
    let mut problems = Vec::new();
    for (path, text) in all_files() {
        for (i, line) in text.lines().enumerate() {
            if let Some(mark) = marks.iter().find(|mark| line.contains(**mark)) {
                problems.push(format!("{path}:{}: {mark}", i + 1));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn the_architecture_page_names_every_crate_and_is_short() {
    let page = read(&root().join("ARCHITECTURE.md"));
    let missing = crates().into_iter().filter(|krate| !page.contains(&format!("`{}`", krate.name)));
    assert_none(
        &missing.map(|krate| format!("ARCHITECTURE.md does not name {}", krate.name)).collect::<Vec<_>>(),
    );
    assert!(page.lines().count() <= MAX_ARCHITECTURE_LINES);
}

#[test]
fn every_lib_has_a_layout() {
    let roots = all_files().into_iter().filter(|(path, _)| path.ends_with("src/lib.rs"));
    let bare = roots.filter(|(_, text)| !text.contains("# Layout"));
    assert_none(&bare.map(|(path, _)| format!("{path} has no `# Layout`")).collect::<Vec<_>>());
}

#[test]
fn every_protobuf_message_service_and_scalar_field_is_commented() {
    let mut problems = Vec::new();
    for path in files_below(&root().join("proto"), "proto") {
        let text = read(&path);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (i, line) in lines.iter().enumerate() {
            let commented = i > 0 && lines[i - 1].starts_with("//");
            let kinds = ["message ", "service ", "rpc ", "enum "];
            let declared = kinds.iter().any(|kind| line.starts_with(kind)) || is_scalar_field(line);
            if declared && !commented {
                problems.push(format!("{}:{}: `{line}` has no comment", relative(&path), i + 1));
            }
        }
    }
    assert_none(&problems);
}

/// A field with a number for its value, which has a unit; fields of message types are explained by their type.
fn is_scalar_field(line: &str) -> bool {
    let scalars = ["uint32", "uint64", "int32", "int64", "float", "double", "bool", "string", "bytes"];
    let first = line.trim_start_matches("optional ").trim_start_matches("repeated ").split(' ').next();
    line.ends_with(';') && line.contains(" = ") && first.is_some_and(|first| scalars.contains(&first))
}
