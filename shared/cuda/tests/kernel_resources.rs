//! What each kernel takes of a multiprocessor: nothing spills, and README.md says it. No GPU is needed.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use paceline_cuda::{image, kernels};

/// Kernels that may spill registers, each with the reason.
const MAY_SPILL: [(&str, &str); 6] = [
    ("linear_many_q2_k", "a few words at the border of its loop"),
    ("linear_many_q4_1", "a few words at the border of its loop"),
    ("linear_many_q5_1", "a few words at the border of its loop"),
    ("linear_few_small_q2_k", "two words, so that a second block shares the multiprocessor"),
    ("linear_few_q5_k", "13 words on sm_80, so that a third block shares the multiprocessor"),
    ("linear_few_q6_k", "four words, so that a third block shares the multiprocessor"),
];
const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

#[test]
fn every_kernel_is_compiled_for_every_architecture_and_none_spills() {
    let resources = image::resources(image::REPORT);
    let mut problems = Vec::new();
    for (name, _) in kernels::signatures() {
        for arch in ARCHITECTURES {
            match resources.iter().find(|it| it.kernel == name && it.arch == arch) {
                None => problems.push(format!("{name} is not compiled for {arch}")),
                Some(it) if it.spill_bytes > 0 && !MAY_SPILL.iter().any(|(listed, _)| *listed == name) => {
                    problems.push(format!("{name} spills {} bytes on {arch}", it.spill_bytes));
                }
                Some(_) => {}
            }
        }
    }
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

/// Other compilers assign registers otherwise, so the table is bound to the one it names.
#[test]
fn the_table_in_the_readme_is_that_of_this_build() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("<!-- resources: nvcc ").expect("the mark before the table");
    let (version, rest) = rest.split_once(" -->\n").unwrap();
    let (table, _) = rest.split_once("<!-- end -->").expect("the mark behind the table");
    if version != image::NVCC_VERSION {
        println!("skipped: the table is of nvcc {version}, this is {}", image::NVCC_VERSION);
        return;
    }
    let now = image::table(&image::resources(image::REPORT));
    assert!(table == now, "put this into README.md:\n{now}");
}
