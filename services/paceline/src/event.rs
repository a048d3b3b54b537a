//! What services tell whoever started them: one JSON object a line on their standard output.

use serde::Deserialize;

/// One event of a shard or coordinator that runs with `--events`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The service accepts connections.
    Listening {
        /// `host:port`.
        address: String,
    },
    /// A group is being formed, or has to be formed again.
    Forming {
        /// Which group.
        #[serde(default)]
        group: usize,
        /// Why it is not formed yet.
        problem: String,
    },
    /// A rank loads its slice.
    Loading {
        /// Which group.
        #[serde(default)]
        group: usize,
        /// Which rank of it.
        rank: u32,
        /// Bytes of the slice done.
        done_bytes: u64,
        /// Bytes of the slice.
        total_bytes: u64,
    },
    /// A group can execute steps.
    Ready {
        /// Which group.
        #[serde(default)]
        group: usize,
        /// `host:port` of the coordinator.
        address: String,
        /// `host:port` of its HTTP port, where it has one.
        #[serde(default)]
        http: Option<String>,
        /// Name the model is served under.
        model: String,
        /// Ranks of the group.
        ranks: u32,
        /// What float matrices became at load.
        #[serde(default)]
        quantize: Option<String>,
        /// Bytes of weights that the ranks hold.
        #[serde(default)]
        weight_bytes: u64,
        /// Bytes that quantization at load has saved them.
        #[serde(default)]
        saved_bytes: u64,
    },
}

impl Event {
    /// The event of a line; `None` for lines that are none, such as those of a later version.
    pub fn from_line(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_services_write_them() {
        let listening = Event::from_line(r#"{"event":"listening","address":"127.0.0.1:41234"}"#);
        assert_eq!(listening, Some(Event::Listening { address: "127.0.0.1:41234".into() }));
        let loading =
            Event::from_line(r#"{"event":"loading","group":1,"rank":1,"done_bytes":1,"total_bytes":2}"#);
        assert_eq!(loading, Some(Event::Loading { group: 1, rank: 1, done_bytes: 1, total_bytes: 2 }));
        let ready = Event::from_line(
            r#"{"event":"ready","address":"a:1","http":"a:2","model":"m","quantize":"q8_0","ranks":2,"weight_bytes":7,"saved_bytes":5}"#,
        );
        let (address, http, model) = ("a:1".into(), Some("a:2".into()), "m".into());
        let quantize = Some("q8_0".into());
        let expected = Event::Ready {
            group: 0,
            address,
            http,
            model,
            ranks: 2,
            quantize,
            weight_bytes: 7,
            saved_bytes: 5,
        };
        assert_eq!(ready, Some(expected));
        let forming = Event::from_line(r#"{"event":"forming","problem":"no memory"}"#);
        assert_eq!(forming, Some(Event::Forming { group: 0, problem: "no memory".into() }));
        assert_eq!(Event::from_line(r#"{"event":"resized"}"#), None);
        assert_eq!(Event::from_line("plain text"), None);
    }
}
