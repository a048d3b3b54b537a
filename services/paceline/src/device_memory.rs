//! How much memory of a device may be used: what the user says of it. No device is asked.

use clap::Args;
use paceline_model::DeviceFit;
use paceline_shard::device::GpuMemory;
use serde_json::{Value, json};

use crate::progress::megabytes;

/// Memory of the device that each rank has for itself.
#[derive(Args, Clone, Copy, Debug)]
pub struct DeviceMemory {
    /// Memory of each rank's GPU, for instance 80GiB, 24GB or a number of bytes: shows what fits beside the weights
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "GPU")]
    device_bytes: Option<u64>,
    /// Share of that memory that may be used
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.9,
        value_parser = share,
        help_heading = "GPU"
    )]
    gpu_memory: f64,
}

impl DeviceMemory {
    /// Share of a device's free memory that may be used.
    pub fn share(&self) -> GpuMemory {
        GpuMemory(self.gpu_memory)
    }

    /// Bytes that may be used, when the user spoke of a device.
    pub fn usable_bytes(&self) -> Option<u64> {
        self.device_bytes.map(|bytes| (bytes as f64 * self.gpu_memory) as u64)
    }
}

/// The fit in words: what is taken, then what remains or what is lacking.
pub fn fit_text(fit: &DeviceFit, usable_bytes: u64) -> String {
    let (fixed, usable) = (megabytes(fit.fixed_bytes), megabytes(usable_bytes));
    let rest = match fit {
        DeviceFit { missing_bytes: 1.., .. } => {
            format!("does not fit: {} are lacking", megabytes(fit.missing_bytes))
        }
        DeviceFit { n_kv_blocks: u64::MAX, .. } => "fits; it has no KV cache".into(),
        _ => format!("leaves {} KV blocks, {} tokens", fit.n_kv_blocks, fit.n_kv_tokens()),
    };
    format!("{fixed} of {usable} usable, {rest}")
}

/// The fit as JSON; a rank without KV cache has no number of blocks.
pub fn fit_json(fit: &DeviceFit, usable_bytes: u64) -> Value {
    let bounded = |n: u64| (fit.n_kv_blocks != u64::MAX).then_some(n);
    json!({
        "usable_bytes": usable_bytes,
        "fixed_bytes": fit.fixed_bytes,
        "missing_bytes": fit.missing_bytes,
        "kv_blocks": bounded(fit.n_kv_blocks),
        "kv_tokens": bounded(fit.n_kv_tokens()),
    })
}

fn bytes(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[number.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "mb" => 1e6,
        "gb" => 1e9,
        "mib" => (1u64 << 20) as f64,
        "gib" => (1u64 << 30) as f64,
        other => return Err(format!("the unit `{other}` is not known; known are B, MB, GB, MiB, GiB")),
    };
    let bytes = number.trim_end().parse::<f64>().map(|number| number * unit);
    bytes
        .ok()
        .filter(|bytes| (1.0..1e18).contains(bytes))
        .map(|bytes| bytes as u64)
        .ok_or_else(|| format!("`{text}` is no size; examples are 80GiB, 24GB, 85899345920"))
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "it must be above 0 and at most 1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("80GiB"), Ok(80 << 30));
        assert_eq!(bytes("1.5 gb"), Ok(1_500_000_000));
        assert_eq!(bytes("85899345920"), Ok(80 << 30));
        for nonsense in ["", "GiB", "-1GB", "1e30", "80TiB", "nan", "inf"] {
            assert!(bytes(nonsense).is_err(), "{nonsense}");
        }
        assert!(share("0").is_err() && share("1.1").is_err() && share("nan").is_err());
        assert_eq!(share("0.9"), Ok(0.9));
    }

    #[test]
    fn a_fit_says_what_remains_or_what_is_lacking() {
        let text = |fit: DeviceFit| fit_text(&fit, 10_000_000);
        let fits = DeviceFit { fixed_bytes: 1_000_000, missing_bytes: 0, n_kv_blocks: 5 };
        assert_eq!(text(fits), "1.0 MB of 10.0 MB usable, leaves 5 KV blocks, 80 tokens");
        let not = DeviceFit { missing_bytes: 2_000_000, n_kv_blocks: 0, ..fits };
        assert_eq!(text(not), "1.0 MB of 10.0 MB usable, does not fit: 2.0 MB are lacking");
        let headless = DeviceFit { n_kv_blocks: u64::MAX, ..fits };
        assert_eq!(text(headless), "1.0 MB of 10.0 MB usable, fits; it has no KV cache");
        assert_eq!(fit_json(&headless, 1)["kv_blocks"], Value::Null);
        assert_eq!(fit_json(&fits, 1)["kv_tokens"], 80);
    }
}
