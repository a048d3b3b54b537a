//! The arguments a kernel takes, as compiled, are those its launcher gives. No GPU is needed.

use paceline_cuda::{image, kernels};
use std::collections::BTreeMap;

#[test]
fn every_kernel_takes_the_struct_its_launcher_gives() {
    let launchers: Vec<(&str, usize)> = kernels::signatures();
    let expected: BTreeMap<String, Vec<usize>> =
        launchers.iter().map(|(name, n_bytes)| ((*name).to_owned(), vec![*n_bytes])).collect();
    assert_eq!(expected.len(), launchers.len(), "a kernel has two launchers");
    let compiled: BTreeMap<String, Vec<usize>> = image::parameters(image::PTX).into_iter().collect();
    let mut problems = Vec::new();
    for (name, bytes) in &compiled {
        match expected.get(name) {
            None => problems.push(format!("{name} has no launcher")),
            Some(given) if given != bytes => {
                problems.push(format!(
                    "{name} takes parameters of {bytes:?} bytes, its launcher gives {given:?}"
                ));
            }
            Some(_) => {}
        }
    }
    let missing = expected.keys().filter(|name| !compiled.contains_key(*name));
    problems.extend(missing.map(|name| format!("{name} is launched but not compiled")));
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}
