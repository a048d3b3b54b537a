//! Sets up logs and span export for one process. Whoever calls [`Telemetry::start`] must keep the guard and call
//! [`Telemetry::stop`] at the end, or the last spans are lost.

use std::{env, io::IsTerminal as _};

use anyhow::Context as _;
use opentelemetry::{global, trace::TracerProvider as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracerProvider},
};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// What a process tells about itself and where.
#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    /// `service.name` of its spans.
    pub service: &'static str,
    /// Filter of log lines, in the syntax of `RUST_LOG`.
    pub log_filter: String,
    /// Send spans to the OTLP endpoint named by the standard variables.
    pub export: bool,
}

impl TelemetryConfig {
    /// From `PACELINE_LOG` or `RUST_LOG` (default `info`) and `OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT`.
    pub fn from_env(service: &'static str) -> Self {
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            service,
            log_filter: set("PACELINE_LOG").or_else(|| set("RUST_LOG")).unwrap_or_else(|| "info".into()),
            export: set("OTEL_EXPORTER_OTLP_ENDPOINT").is_some()
                || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").is_some(),
        }
    }
}

/// Keeps the exporter alive.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Telemetry {
    /// Installs the process-wide subscriber. Call once, inside a Tokio runtime.
    ///
    /// Without an endpoint no span is recorded, but the trace context of callers still passes through.
    ///
    /// # Errors
    /// When the log filter does not parse, the endpoint is no address, or a subscriber is already installed.
    pub fn start(config: &TelemetryConfig) -> anyhow::Result<Self> {
        global::set_text_map_propagator(TraceContextPropagator::new());
        let resource = Resource::builder().with_service_name(config.service).build();
        let mut builder = SdkTracerProvider::builder().with_resource(resource);
        builder = if config.export {
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_tonic()
                .build()
                .context("the OTLP endpoint in OTEL_EXPORTER_OTLP_ENDPOINT cannot be used")?;
            builder
                .with_batch_exporter(exporter)
                .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        } else {
            builder.with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)))
        };
        let provider = builder.build();
        let filter = EnvFilter::try_new(&config.log_filter)
            .with_context(|| format!("log filter {:?} does not parse", config.log_filter))?;
        let logs = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_filter(filter);
        let spans = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("paceline"))
            .with_filter(EnvFilter::new("off,paceline=trace"));
        tracing_subscriber::registry()
            .with(spans)
            .with(logs)
            .try_init()
            .context("a tracing subscriber is already installed in this process")?;
        Ok(Self { provider })
    }

    /// Sends what is still buffered; gives up after the exporter's time limit.
    pub fn stop(self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::debug!(%error, "spans left behind at shutdown");
        }
    }
}
