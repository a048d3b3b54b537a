//! Paceline's own protocol. Each client has a connection of its own.

use anyhow::{Context as _, bail};
use futures_util::future::try_join_all;
use paceline::answer::{connect, served_model};
use paceline_wire::inference::{
    Chat, ChatMessage, GenerateRequest, SamplingOptions, StopOptions, generate_request::Input,
    generate_response::Event, inference_client::InferenceClient,
};
use tonic::{Code, Request, metadata::AsciiMetadataValue, transport::Channel};

use super::{
    Options,
    arrivals::Planned,
    prompts::Text,
    target::{Answer, Outcome},
};

/// Connections at most; more clients share them.
const MAX_CONNECTIONS: usize = 64;

/// A Paceline server.
#[derive(Debug)]
pub struct Grpc {
    clients: Vec<InferenceClient<Channel>>,
    model: String,
    sampling: SamplingOptions,
    ignore_eos: Option<bool>,
    /// As they are in metadata.
    tenants: Vec<AsciiMetadataValue>,
}

impl Grpc {
    /// Connects every client.
    ///
    /// # Errors
    /// When nobody answers, or the model is not there.
    pub async fn connect(options: &Options) -> anyhow::Result<Self> {
        let address = format!("http://{}", options.address().context("no address")?);
        let n_clients = if options.total_rate().is_some() { MAX_CONNECTIONS } else { options.clients };
        let connections = (0..n_clients.min(MAX_CONNECTIONS)).map(|_| connect(&address));
        let mut clients = try_join_all(connections).await?;
        let model = served_model(&mut clients[0], options.model.as_deref()).await?.name;
        let sampling =
            SamplingOptions { temperature: Some(options.temperature), ..SamplingOptions::default() };
        let tenants = options.tenants.iter().map(|tenant| tenant.name.parse().context("a tenant's name"));
        let (tenants, ignore_eos) = (tenants.collect::<Result<_, _>>()?, options.ignore_eos.then_some(true));
        Ok(Self { clients, model, sampling, ignore_eos, tenants })
    }

    fn request(&self, planned: &Planned) -> GenerateRequest {
        let input = match &planned.text {
            Text::Raw(text) => Input::Prompt(text.clone()),
            Text::Chat(messages) => {
                let messages = messages.iter().cloned();
                let message = |message: super::prompts::Message| ChatMessage {
                    role: message.role,
                    content: message.content,
                };
                Input::Chat(Chat { messages: messages.map(message).collect() })
            }
        };
        let stop = StopOptions {
            max_tokens: Some(planned.max_tokens),
            ignore_eos: self.ignore_eos,
            ..StopOptions::default()
        };
        GenerateRequest {
            model: Some(self.model.clone()),
            input: Some(input),
            sampling: Some(self.sampling.clone()),
            stop: Some(stop),
            ..GenerateRequest::default()
        }
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// Any status but that there is no place.
    pub async fn send(
        &self,
        client: usize,
        planned: &Planned,
        answer: &mut Answer,
    ) -> anyhow::Result<Outcome> {
        let mut client = self.clients[client % self.clients.len()].clone();
        let mut request = Request::new(self.request(planned));
        if let Some(tenant) = planned.tenant {
            request.metadata_mut().insert("x-tenant", self.tenants[tenant].clone());
        }
        let mut stream = match client.generate(request).await {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == Code::ResourceExhausted => return Ok(Outcome::Refused),
            Err(status) => bail!("{:?}: {}", status.code(), status.message()),
        };
        while !answer.is_enough(planned) {
            let chunk = match stream.message().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => bail!("the stream ended without a last chunk"),
                Err(status) => bail!("{:?}: {}", status.code(), status.message()),
            };
            match chunk.event {
                Some(Event::Delta(delta)) => answer.chunk(delta.token_ids.len() as u64),
                Some(Event::Finished(finished)) => {
                    answer.n_cached = finished.usage.map(|usage| u64::from(usage.cached_tokens));
                    return Ok(Outcome::Finished);
                }
                _ => {}
            }
        }
        Ok(Outcome::Cancelled)
    }
}
