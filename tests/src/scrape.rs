//! What the coordinator's HTTP port says, read as plainly as possible.

use std::collections::HashMap;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Status line, headers and body of an answer.
///
/// # Panics
/// When nobody answers.
pub async fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.expect("somebody listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_lowercase(), body.to_owned())
}

/// Value of each series of a coordinator's metrics, by its name with labels.
///
/// # Panics
/// When they are malformed.
pub async fn scraped(address: &str) -> HashMap<String, f64> {
    let (head, body) = get(address, "/metrics").await;
    assert!(head.starts_with("http/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    let series = body.lines().filter(|line| !line.starts_with('#') && line.contains(' '));
    let value = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    series.map(value).collect()
}

/// Value of a series of the first group.
///
/// # Panics
/// When nobody answers, or there is no such series.
pub async fn metric(address: &str, name: &str) -> f64 {
    let (name, all) = (of_group(0, name), scraped(address).await);
    *all.get(&name).unwrap_or_else(|| panic!("no {name}"))
}

/// The name of a series with the label of its group, which refusals do not have.
pub fn of_group(group: usize, name: &str) -> String {
    match name.split_once('{') {
        _ if name.starts_with("paceline_rejected_total") => name.into(),
        Some((name, labels)) => format!("{name}{{group=\"{group}\",{labels}"),
        None => format!("{name}{{group=\"{group}\"}}"),
    }
}
