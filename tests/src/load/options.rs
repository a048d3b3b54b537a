//! The command line of the load generator. All problems are reported together.

use std::{path::PathBuf, str::FromStr};

use clap::{Parser, ValueEnum};

/// Sends many requests to a server and prints how long they waited.
///
/// Without --rate each of --clients sends its next request when its last one has ended; with --rate requests come by a
/// Poisson process, whatever the server does.
#[derive(Parser, Clone, Debug)]
#[command(version, about)]
pub struct Options {
    /// The server, as http://host:port; grpc://host:port is the same with --protocol grpc
    #[arg(long, default_value = "http://127.0.0.1:50051")]
    pub endpoint: String,
    /// What it speaks: Paceline's gRPC, or HTTP as OpenAI's clients do
    #[arg(long, value_enum, default_value_t = Protocol::Grpc)]
    pub protocol: Protocol,
    /// Model to ask for [default: the first one served]
    #[arg(long)]
    pub model: Option<String>,
    /// Clients that send one request after the other
    #[arg(long, default_value_t = 1)]
    pub clients: usize,
    /// Requests in total, without --warmup
    #[arg(long, default_value_t = 32)]
    pub requests: usize,
    /// Requests that come in a second, on average; --clients does not matter then
    #[arg(long)]
    pub rate: Option<f64>,
    /// Whose requests (metadata x-tenant) come at which rate, separated by commas; instead of --rate
    #[arg(long, value_name = "NAME=RATE,...", value_delimiter = ',', conflicts_with = "rate")]
    pub tenants: Vec<TenantRate>,
    /// Prompts with their output lengths, one JSON object a line [default: tests/load/prompts.jsonl of this source]
    #[arg(long)]
    pub prompts: Option<PathBuf>,
    /// Only prompts whose name begins with this
    #[arg(long)]
    pub only: Option<String>,
    /// Most tokens of each answer [default: what the prompt's line says]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Go on after the model's end token, so that each answer has its full length
    #[arg(long)]
    pub ignore_eos: bool,
    /// Temperature of sampling
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Share of requests that the client breaks off at a random place
    #[arg(long, default_value_t = 0.0)]
    pub cancel_fraction: f64,
    /// Seed of prompts, arrivals and cancels
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests sent one by one before the others and not counted
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// A tenant and its requests a second.
#[derive(Clone, PartialEq, Debug)]
pub struct TenantRate {
    /// Name in the metadata.
    pub name: String,
    /// Requests a second, on average.
    pub rate: f64,
}

impl FromStr for TenantRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('=').and_then(|(name, rate)| Some((name, rate.parse().ok()?)));
        match parsed {
            Some((name, rate)) if !name.is_empty() && is_rate(rate) => Ok(Self { name: name.into(), rate }),
            _ => Err(format!("{text:?} is not like light=0.5, with a rate above 0 and at most 100000")),
        }
    }
}

fn is_rate(rate: f64) -> bool {
    rate > 0.0 && rate <= 1e5
}

/// What a server speaks.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// `paceline.v1.Inference`.
    Grpc,
    /// `/v1/chat/completions` and `/v1/completions`, streamed by server-sent events.
    Openai,
}

impl Options {
    /// Checks what can be checked without a server.
    ///
    /// # Errors
    /// Every value that is out of its range.
    pub fn check(&self) -> anyhow::Result<()> {
        let mut problems = Vec::new();
        if !(1..=4096).contains(&self.clients) {
            problems.push(format!("--clients is {}; it must be from 1 to 4096", self.clients));
        }
        if !(1..=10_000_000).contains(&self.requests) {
            problems.push(format!("--requests is {}; it must be from 1 to 10000000", self.requests));
        }
        if self.rate.is_some_and(|rate| !is_rate(rate)) {
            problems.push(format!("--rate is {:?}; it must be above 0 and at most 100000", self.rate));
        }
        if !(0.0..=1.0).contains(&self.cancel_fraction) {
            problems.push(format!("--cancel-fraction is {}; it must be from 0 to 1", self.cancel_fraction));
        }
        if !self.tenants.is_empty() && self.protocol == Protocol::Openai {
            problems.push("--tenants are metadata of gRPC; there are none with --protocol openai".into());
        }
        if self.max_tokens == Some(0) {
            problems.push("--max-tokens is 0; it must be at least 1".into());
        }
        if self.address().is_none() {
            let endpoint = &self.endpoint;
            problems.push(format!("--endpoint is {endpoint:?}; it must be like http://127.0.0.1:50051"));
        }
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
        Ok(())
    }

    /// Requests a second of all tenants; nothing where each client waits for its answer.
    pub fn total_rate(&self) -> Option<f64> {
        let of_tenants = || self.tenants.iter().map(|tenant| tenant.rate).sum();
        self.rate.or_else(|| (!self.tenants.is_empty()).then(of_tenants))
    }

    /// `host:port` of the endpoint.
    pub fn address(&self) -> Option<&str> {
        let schemes: &[&str] = match self.protocol {
            Protocol::Grpc => &["http://", "grpc://"],
            Protocol::Openai => &["http://"],
        };
        let rest = schemes.iter().find_map(|scheme| self.endpoint.strip_prefix(scheme))?;
        let address = rest.trim_end_matches('/').trim_end_matches("/v1");
        let (host, port) = address.rsplit_once(':')?;
        (!host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()).then_some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        Options::parse_from(["load"].iter().chain(arguments))
    }

    #[test]
    fn endpoints_are_told_by_host_and_port() {
        let address = |arguments: &[&str]| options(arguments).address().map(str::to_owned);
        assert_eq!(address(&["--endpoint", "grpc://a:1"]).as_deref(), Some("a:1"));
        assert_eq!(
            address(&["--endpoint", "http://[::1]:8000/v1/", "--protocol", "openai"]).as_deref(),
            Some("[::1]:8000")
        );
        for wrong in ["https://a:1", "a:1", "http://a", "http://:1", "http://a:99999", "http://a/b:1"] {
            assert_eq!(address(&["--endpoint", wrong]), None, "{wrong}");
        }
        assert_eq!(address(&["--endpoint", "grpc://a:1", "--protocol", "openai"]), None);
    }

    #[test]
    fn all_problems_are_reported_together() {
        let wrong = [
            "--clients=0",
            "--requests=0",
            "--rate=-1",
            "--cancel-fraction=2",
            "--max-tokens=0",
            "--endpoint=x",
        ];
        let message = options(&wrong).check().expect_err("must be refused").to_string();
        for flag in wrong {
            let name = flag.split('=').next().expect("a name");
            assert!(message.contains(name), "{name} in {message}");
        }
        options(&[]).check().expect("the defaults are good");
        assert!(options(&["--rate=NaN"]).check().is_err());
        assert!(options(&["--tenants=a=1", "--protocol=openai"]).check().is_err());
    }

    #[test]
    fn tenants_have_names_and_rates_that_add_up() {
        let both = options(&["--tenants", "light=0.5,flood=50"]);
        assert_eq!((both.tenants[1].name.as_str(), both.total_rate()), ("flood", Some(50.5)));
        for wrong in ["light", "=1", "a=0", "a=x", "a=1e9"] {
            assert!(Options::try_parse_from(["load", "--tenants", wrong]).is_err(), "{wrong}");
        }
        assert!(Options::try_parse_from(["load", "--tenants", "a=1", "--rate", "1"]).is_err());
        assert_eq!((options(&[]).total_rate(), options(&["--rate=2"]).total_rate()), (None, Some(2.0)));
    }
}
