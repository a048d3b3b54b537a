//! The HTTP protocol of OpenAI's clients, as far as load needs it: the list of models, chat and text completions as
//! server-sent events. Each request has a connection of its own; there is no TLS.

use anyhow::{Context as _, bail, ensure};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{
    Options,
    arrivals::Planned,
    prompts::Text,
    sse::Events,
    target::{Answer, Outcome},
};

/// Most bytes of an answer that is not a stream.
const MAX_BODY_BYTES: usize = 1 << 20;

/// Such a server.
#[derive(Clone, Debug)]
pub struct OpenAi {
    address: String,
    model: String,
    temperature: f32,
    ignore_eos: bool,
}

impl OpenAi {
    /// Asks which models there are.
    ///
    /// # Errors
    /// When nobody answers, or the model is not there.
    pub async fn connect(options: &Options) -> anyhow::Result<Self> {
        let address = options.address().context("no address")?.to_owned();
        let target = Self {
            address,
            model: String::new(),
            temperature: options.temperature,
            ignore_eos: options.ignore_eos,
        };
        let response = target.exchange(Method::GET, "/v1/models", String::new()).await?;
        let status = response.status();
        let body = text(response).await?;
        ensure!(status.is_success(), "/v1/models is answered with {status}: {body}");
        let models: Value = serde_json::from_str(&body).context("/v1/models is not JSON")?;
        let ids: Vec<&str> = models["data"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|model| model["id"].as_str())
            .collect();
        let wanted = options.model.as_deref();
        let found = ids.iter().find(|id| wanted.is_none_or(|wanted| wanted == **id));
        let model = found.with_context(|| format!("model {wanted:?} is not among {ids:?}"))?.to_string();
        Ok(Self { model, ..target })
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// A server that cannot be reached, an HTTP status, or a stream that is not as it should be.
    pub async fn send(&self, planned: &Planned, answer: &mut Answer) -> anyhow::Result<Outcome> {
        let (path, body) = self.body(planned);
        let response = self.exchange(Method::POST, path, body.to_string()).await?;
        match response.status() {
            StatusCode::OK => self.read(response, planned, answer).await,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Ok(Outcome::Refused),
            status => bail!("{status}: {}", text(response).await?),
        }
    }

    fn body(&self, planned: &Planned) -> (&'static str, Value) {
        let (path, key, input) = match &planned.text {
            Text::Raw(text) => ("/v1/completions", "prompt", Value::from(text.as_str())),
            Text::Chat(messages) => {
                let message = |message: &super::prompts::Message| json!({ "role": message.role, "content": message.content });
                ("/v1/chat/completions", "messages", messages.iter().map(message).collect())
            }
        };
        let mut body = json!({
            "model": self.model, key: input, "max_tokens": planned.max_tokens, "temperature": self.temperature,
            "stream": true, "stream_options": { "include_usage": true },
        });
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        (path, body)
    }

    async fn read(
        &self,
        response: Response<Incoming>,
        planned: &Planned,
        answer: &mut Answer,
    ) -> anyhow::Result<Outcome> {
        let (mut body, mut events, mut reading) =
            (response.into_body(), Events::default(), Reading::default());
        while !answer.is_enough(planned) {
            let Some(frame) = body.frame().await else {
                ensure!(reading.is_finished, "the stream ended without a finish_reason");
                break;
            };
            let Ok(bytes) = frame?.into_data() else { continue };
            for data in events.push(&bytes)? {
                reading.take(&data, answer)?;
            }
        }
        if let Some(n_tokens) = reading.n_tokens {
            answer.n_tokens = n_tokens;
        }
        Ok(if reading.is_finished { Outcome::Finished } else { Outcome::Cancelled })
    }

    async fn exchange(&self, method: Method, path: &str, body: String) -> anyhow::Result<Response<Incoming>> {
        let unreachable = || format!("no server answers at http://{}", self.address);
        let stream = TcpStream::connect(&self.address).await.with_context(unreachable)?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the body, or when the body is dropped; its error is the body's too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.address)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        sender.send_request(request).await.with_context(unreachable)
    }
}

/// What a stream has said so far beside its text.
#[derive(Debug, Default)]
struct Reading {
    is_finished: bool,
    n_tokens: Option<u64>,
}

impl Reading {
    /// One event.
    fn take(&mut self, data: &str, answer: &mut Answer) -> anyhow::Result<()> {
        if data == "[DONE]" {
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data:?}"))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            bail!("{error}");
        }
        let choice = &event["choices"][0];
        let text =
            choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
        if !text.is_empty() {
            answer.chunk(1);
        }
        self.is_finished |= choice["finish_reason"].is_string();
        self.n_tokens = event["usage"]["completion_tokens"].as_u64().or(self.n_tokens);
        let n_cached = event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        answer.n_cached = n_cached.or(answer.n_cached);
        Ok(())
    }
}

async fn text(response: Response<Incoming>) -> anyhow::Result<String> {
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("the answer cannot be read: {error}"))?;
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn read(events: &[&str]) -> anyhow::Result<(Reading, Answer)> {
        let (mut reading, mut answer) = (Reading::default(), Answer::new(Instant::now()));
        for data in events {
            reading.take(data, &mut answer)?;
        }
        Ok((reading, answer))
    }

    #[test]
    fn chunks_with_text_count_until_usage_is_told() {
        let events = [
            r#"{"choices": [{"delta": {"role": "assistant"}, "finish_reason": null}]}"#,
            r#"{"choices": [{"delta": {"content": "A"}, "finish_reason": null}]}"#,
            r#"{"choices": [{"text": " tide", "finish_reason": null}]}"#,
            r#"{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": null}"#,
            r#"{"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}}"#,
            "[DONE]",
        ];
        let (reading, answer) = read(&events[..3]).expect("events");
        assert_eq!((reading.is_finished, answer.chunks.len(), answer.n_tokens), (false, 2, 2));
        let (reading, answer) = read(&events).expect("events");
        assert_eq!((reading.is_finished, reading.n_tokens, answer.n_cached), (true, Some(5), Some(16)));
    }

    #[test]
    fn errors_inside_a_stream_are_errors() {
        let error = read(&[r#"{"error": {"message": "out of memory"}}"#]).expect_err("must fail");
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(read(&["{"]).is_err());
    }
}
