//! Loads the model, listens, and ends cleanly when asked to.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use paceline_checkpoint::Checkpoint;
use paceline_domain::{DraftQuantization, Quantization};
use paceline_model::{Capacity, Decoder, Device, LoadSpec, ModelConfig, SplitPlan};
use paceline_serving::{Internal, listen};
use paceline_text::Tokenizer;
use paceline_wire::{MAX_INTERNAL_MESSAGE_BYTES, draft::draft_server::DraftServer};
use tokio::sync::mpsc;
use tonic::service::Routes;

use crate::{
    Config,
    drafting::{self, MAX_COMMANDS},
    model::OneRank,
    planner::PassLimits,
    service::{About, DraftService},
    sessions::{Limits, Sessions},
    vocabulary::head_tokens,
};

/// How long streams may take to end after a shutdown was asked for: they live as long as their coordinator.
const DRAIN: Duration = Duration::from_millis(200);

/// Serves until `shutdown` resolves.
///
/// # Errors
/// When the model cannot be opened or is not supported, a flag is out of range, the address cannot be bound, or the
/// model's device fails.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
    let loading = config.clone();
    let drafter = tokio::task::spawn_blocking(move || Drafter::load(&loading)).await??;
    let listener = listen(config.listen).await?;
    let address = listener.local_addr()?;
    let (commands, queue) = mpsc::channel(MAX_COMMANDS);
    let limits = PassLimits { max_rows: config.max_rows, prompt_rows: config.prompt_rows };
    let thread = drafting::start(Box::new(drafter.model), drafter.sessions, limits, queue)?;
    let service = DraftServer::new(DraftService::new(drafter.about, commands))
        .max_decoding_message_size(MAX_INTERNAL_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_INTERNAL_MESSAGE_BYTES);
    tracing::info!(%address, model = config.model_name(), "draft service listening");
    config.process.listening(address);
    let max_streams = config.max_coordinators.saturating_mul(2);
    let internal = Internal { routes: Routes::new(service), max_streams, drain: DRAIN };
    let serving = internal.serve::<DraftServer<DraftService>>(listener, shutdown);
    let drafting = tokio::task::spawn_blocking(move || thread.join());
    tokio::select! {
        served = serving => served,
        ended = drafting => match ended? {
            Ok(outcome) => outcome.context("the draft model cannot go on"),
            Err(_) => Err(anyhow::anyhow!("the drafting thread panicked; its log says why")),
        },
    }
}

/// What follows from the flags and the model file.
struct Drafter {
    model: OneRank,
    sessions: Sessions,
    about: About,
}

impl Drafter {
    fn load(config: &Config) -> anyhow::Result<Self> {
        let path = config.model.display();
        let checkpoint = Arc::new(
            Checkpoint::open(&config.model).with_context(|| format!("cannot open the model {path}"))?,
        );
        let model = ModelConfig::from_checkpoint(&checkpoint)
            .with_context(|| format!("cannot draft with the model {path}"))?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)
            .with_context(|| format!("cannot use the tokenizer of {path}"))?;
        let context = config.checked_context(model.context_length)?;
        let n_vocab = tokenizer.n_vocab().min(model.n_vocab);
        let head =
            head_tokens(config.vocabulary, n_vocab, tokenizer.eos_tokens()).map_err(anyhow::Error::msg)?;
        let device = paceline_device::choose(&config.device, config.cpu.cpu()?)?;
        let spec = LoadSpec {
            checkpoint: &checkpoint,
            config: &model,
            plan: &SplitPlan::with_head(&model, 1, &head)?,
            rank: 0,
            quantize: config.quantize.unwrap_or_else(|| usual_quantization(device.as_ref())).0,
            capacity: Capacity {
                kv_type: config.kv_type,
                n_kv_blocks: config.kv_blocks as usize,
                max_rows: config.max_rows,
                max_output_rows: config.max_sessions,
            },
            progress: &|_| (),
        };
        let decoder =
            Decoder::load(&spec, device.as_ref()).with_context(|| format!("cannot load the model {path}"))?;
        report(&decoder, &spec);
        let limits = Limits {
            max_sessions: config.max_sessions,
            context,
            n_vocab: u32::try_from(n_vocab)?,
            max_ahead: config.max_ahead,
            n_kv_blocks: config.kv_blocks,
        };
        let about = About {
            model: config.model_name(),
            tokenizer: tokenizer.digest(),
            n_vocab: limits.n_vocab,
            context: u32::try_from(context)?,
            max_sessions: u32::try_from(config.max_sessions)?,
        };
        Ok(Self { model: OneRank::with_head(decoder, head), sessions: Sessions::new(limits), about })
    }
}

/// Where nobody says. On a CPU a token takes as long as its weights take to be read, so they are made small;
/// `shared/speculation/README.md` has what a draft loses by that. On a GPU it was not measured.
fn usual_quantization(device: &dyn Device) -> DraftQuantization {
    if device.is_cpu() { DraftQuantization::SMALLEST } else { DraftQuantization(None) }
}

/// What it weighs, and how much less than in the file.
fn report(decoder: &Decoder, spec: &LoadSpec<'_>) {
    let (quantization, weight_bytes) = (Quantization::name_or_none(spec.quantize), decoder.memory_bytes().0);
    let (n_tokens, saved_bytes) = (spec.plan.head().len(), spec.saved_bytes());
    tracing::info!(quantization, n_tokens, weight_bytes, saved_bytes, "draft model loaded");
}

#[cfg(test)]
mod tests {
    use paceline_kernels::Kernels;
    use paceline_model::{Backend, Cpu, ModelError};

    use super::*;

    /// A device with memory of its own, which loads nothing.
    struct Elsewhere;

    impl Device for Elsewhere {
        fn name(&self) -> String {
            "elsewhere".into()
        }

        fn load(&self, _: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
            unreachable!("nothing is loaded")
        }
    }

    #[test]
    fn weights_are_made_small_where_the_host_reads_them() {
        let cpu = Cpu { kernels: Kernels::detect(), n_threads: 1 };
        assert_eq!(usual_quantization(&cpu).to_string(), "q4_0");
        assert_eq!(usual_quantization(&Elsewhere).to_string(), "none");
    }
}
