//! A client that is not ours: Python's grpcio, with stubs generated from `proto/` and with reflection.

use std::path::{Path, PathBuf};

use paceline_tests::{ClusterSpec, TestCluster};
use tokio::process::Command;

fn python(root: &Path) -> PathBuf {
    let python = std::env::var_os("PACELINE_TEST_PYTHON")
        .map_or_else(|| root.join("target/python/bin/python"), PathBuf::from);
    assert!(
        python.is_file(),
        "{} is missing. Run tests/run, which creates it, or set PACELINE_TEST_PYTHON to a Python with the packages \
         of tests/python/requirements.txt",
        python.display()
    );
    python
}

#[tokio::test]
async fn grpcio_streams_reflects_and_gets_readable_errors() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf();
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let address = cluster.address().trim_start_matches("http://").to_owned();
    let output = Command::new(python(&root))
        .arg(root.join("tests/python/client.py"))
        .args([root.join("proto").as_os_str(), address.as_ref()])
        .output()
        .await
        .expect("runs");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("all checks passed"), "{said}");
}
