//! What a shard can be told. Nothing else in this crate reads flags or the environment.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};
use paceline_collectives::{BindSpec, Transport};
use paceline_device::{CpuOptions, DeviceOptions};
use paceline_domain::Quantization;
use paceline_serving::ProcessOptions;

/// Flags of a shard.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Address to serve the coordinator on; port 0 takes a free one
    #[arg(long, env = "PACELINE_SHARD_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// GGUF file, or directory with config.json and safetensors
    #[arg(long, env = "PACELINE_MODEL")]
    pub model: PathBuf,
    /// Quantize matrices of plain numbers while they are loaded, to q8_0 or q4_k; as the coordinator is told
    #[arg(long, env = "PACELINE_QUANTIZE", value_name = "TYPE")]
    pub quantize: Option<Quantization>,
    /// What to compute with.
    #[command(flatten)]
    pub device: DeviceOptions,
    /// How the CPU is used.
    #[command(flatten)]
    pub cpu: CpuOptions,
    /// Address to bind for other shards (collectives over TCP)
    #[arg(long, env = "PACELINE_PEER_BIND", default_value = "127.0.0.1")]
    pub peer_bind: String,
    /// Host name or address under which other shards reach this one [default: the bound one]
    #[arg(long, env = "PACELINE_PEER_HOST")]
    pub peer_host: Option<String>,
    /// How ranks exchange partial sums; auto takes shared memory when all are on one host
    #[arg(long, env = "PACELINE_TRANSPORT", value_enum, default_value_t = TransportChoice::Auto)]
    pub transport: TransportChoice,
    /// About the process.
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Names of transports.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum TransportChoice {
    Auto,
    SharedMemory,
    Tcp,
}

impl From<TransportChoice> for Transport {
    fn from(choice: TransportChoice) -> Self {
        match choice {
            TransportChoice::Auto => Self::Auto,
            TransportChoice::SharedMemory => Self::SharedMemory,
            TransportChoice::Tcp => Self::Tcp,
        }
    }
}

impl Config {
    /// Where this shard's collective listens.
    pub fn peer_binding(&self) -> BindSpec {
        BindSpec { host: self.peer_bind.clone(), port: 0, advertised_host: self.peer_host.clone() }
    }
}
