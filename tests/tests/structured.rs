//! Texts that must fit a schema, an expression or a grammar, from a real model: they do, whoever proposes tokens, on any
//! number of ranks, alone or among others.

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{chat, generate, generate_choices, greedy, seeded},
};
use paceline_wire::inference::{
    FinishReason, GenerateRequest, JsonObject, ResponseFormat, SpeculationMode, SpeculationOptions,
    inference_client::InferenceClient, response_format::Format,
};
use serde_json::Value;
use tonic::transport::Channel;

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 2, "maxItems": 3}
    },
    "required": ["city", "inhabitants", "sights"],
    "additionalProperties": false
}"#;

/// Whether a text is what it must be.
type Fits = fn(&str) -> bool;

fn with(mut request: GenerateRequest, format: Format) -> GenerateRequest {
    request.stop.as_mut().expect("has stop rules").ignore_eos = None;
    GenerateRequest { response_format: Some(ResponseFormat { format: Some(format) }), ..request }
}

/// Requests, and what each text must be.
fn requests() -> Vec<(GenerateRequest, Fits)> {
    let schema = || Format::JsonSchema(SCHEMA.into());
    vec![
        (with(chat("Describe Paris as JSON.", 200), schema()), is_city),
        (with(seeded("A city as JSON: ", 200, 5), schema()), is_city),
        (with(seeded("Call me: ", 40, 9), Format::Regex("\\+49 [0-9]{3}( [0-9]{2}){2,6}".into())), is_number),
        (
            with(
                greedy("My list: ", 120),
                Format::Lark("start: item (\", \" item){4}\nitem: /[a-z]{3,9}/".into()),
            ),
            |text| text.split(", ").count() == 5,
        ),
    ]
}

fn is_city(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).expect(text);
    let sights = value["sights"].as_array().map_or(0, Vec::len);
    value.as_object().is_some_and(|object| object.len() == 3)
        && value["city"].as_str().is_some_and(|city| city.chars().count() <= 30)
        && value["inhabitants"].as_u64().is_some_and(|n| n <= 99_999_999)
        && (2..=3).contains(&sights)
}

fn is_number(text: &str) -> bool {
    let parts: Vec<&str> = text.split(' ').collect();
    parts[0] == "+49" && parts[1].len() == 3 && (4..=8).contains(&parts.len())
}

fn speculating(request: &GenerateRequest, mode: SpeculationMode) -> GenerateRequest {
    let options = SpeculationOptions { mode: Some(mode.into()), max_tokens: Some(6) };
    GenerateRequest { speculation: Some(options), ..request.clone() }
}

async fn answers(client: &InferenceClient<Channel>, mode: SpeculationMode) -> Vec<Generation> {
    let start = |(request, _): &(GenerateRequest, _)| {
        let (mut client, request) = (client.clone(), speculating(request, mode));
        tokio::spawn(async move { generate(&mut client, request).await.expect("generates") })
    };
    // Somebody without a grammar among them.
    let mut other = client.clone();
    let bystander = tokio::spawn(async move { generate(&mut other, greedy("Once upon a time", 40)).await });
    let mut generations = Vec::new();
    for task in requests().iter().map(start).collect::<Vec<_>>() {
        generations.push(task.await.expect("no panic"));
    }
    bystander.await.expect("no panic").expect("generates");
    generations
}

#[tokio::test]
async fn texts_fit_and_are_the_same_whoever_proposes_and_computes() {
    let mut tokens: Vec<Vec<Vec<u32>>> = Vec::new();
    for n_ranks in [1, 2] {
        let cluster = TestCluster::start(ClusterSpec::small(n_ranks)).await;
        let mut client = cluster.client().await;
        let mut alone = Vec::new();
        for (request, fits) in requests() {
            let request = speculating(&request, SpeculationMode::Off);
            let generation = generate(&mut client, request).await.expect("generates");
            assert_eq!(generation.finished.reason(), FinishReason::Stop, "{}", generation.text);
            assert!(fits(&generation.text), "{}", generation.text);
            alone.push(generation.tokens);
        }
        tokens.push(alone);
        for mode in [SpeculationMode::Off, SpeculationMode::Ngram, SpeculationMode::Auto] {
            let generations = answers(&client, mode).await;
            tokens.push(generations.into_iter().map(|generation| generation.tokens).collect());
        }
        cluster.stop().await;
    }
    assert!(tokens.iter().all(|all| *all == tokens[0]), "{tokens:?}");
}

#[tokio::test]
async fn choices_stand_each_somewhere_else_in_one_grammar() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let mut client = cluster.client().await;
    let request =
        with(seeded("Colours: ", 60, 11), Format::Regex("(red|green|blue)(, (red|green|blue)){2,4}".into()));
    let three = GenerateRequest { n: Some(4), ..request.clone() };
    let choices = generate_choices(&mut client, three).await.expect("generates");
    for choice in &choices {
        assert!(
            choice.text.split(", ").all(|colour| ["red", "green", "blue"].contains(&colour)),
            "{}",
            choice.text
        );
        assert!((3..=5).contains(&choice.text.split(", ").count()), "{}", choice.text);
    }
    for (choice, seed) in choices.iter().zip(&choices[0].started.choice_seeds) {
        let mut alone = request.clone();
        alone.sampling.as_mut().expect("has sampling").seed = Some(*seed);
        assert_eq!(generate(&mut client, alone).await.expect("generates").tokens, choice.tokens);
    }
    let object = with(greedy("{", 200), Format::JsonObject(JsonObject {}));
    let object = generate(&mut client, object).await.expect("generates");
    let is_whole = object.finished.reason() == FinishReason::Stop;
    assert!(!is_whole || serde_json::from_str::<Value>(&object.text).expect("JSON").is_object());
    assert!(object.text.trim_start().starts_with('{'), "{}", object.text);
}
