//! Chat templates render what the Transformers library renders, and stop when they take too much.

use paceline_domain::ErrorKind;
use paceline_text::{AddGenerationPrompt, ChatMessage, ChatTemplate, TextError};
use serde_json::Value;

use crate::fixture;

fn messages(conversation: &Value) -> Vec<ChatMessage> {
    let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
    let message = |message| ChatMessage { role: text(message, "role"), content: text(message, "content") };
    conversation.as_array().unwrap().iter().map(message).collect()
}

fn render(template: &str) -> Result<String, TextError> {
    let user = ChatMessage { role: "user".into(), content: "Hi".into() };
    ChatTemplate::new(template, None, None)?.render(&[user], AddGenerationPrompt::Yes)
}

#[test]
fn every_render_equals_transformers() {
    let golden = fixture::golden("chat_templates.json");
    let variable = |name: &str| Some(golden["variables"][name].as_str().unwrap().to_owned());
    let mut n_renders = 0;
    for (name, source) in golden["templates"].as_object().unwrap() {
        let template =
            ChatTemplate::new(source.as_str().unwrap(), variable("bos_token"), variable("eos_token"))
                .unwrap();
        for case in golden["renders"].as_array().unwrap().iter().filter(|case| case["template"] == *name) {
            let conversation = &golden["conversations"][case["conversation"].as_u64().unwrap() as usize];
            let add = match case["add_generation_prompt"].as_bool().unwrap() {
                true => AddGenerationPrompt::Yes,
                false => AddGenerationPrompt::No,
            };
            let result = template.render(&messages(conversation), add);
            match (case["text"].as_str(), result) {
                (Some(expected), Ok(text)) => assert_eq!(text, expected, "{name} {conversation}"),
                (None, Err(TextError::TemplateRefused(message))) => assert_eq!(message, case["error"]),
                (None, Err(TextError::TemplateFailed(_))) => assert_eq!(name, "blows_up"),
                (expected, result) => panic!("{name} {conversation}: {result:?} instead of {expected:?}"),
            }
            n_renders += 1;
        }
    }
    assert_eq!(n_renders, golden["renders"].as_array().unwrap().len());
    assert!(n_renders >= 100, "only {n_renders}");
}

#[test]
fn the_template_of_a_model_file_is_used() {
    let template = ChatTemplate::from_checkpoint(&fixture::model(fixture::SMOLLM2)).unwrap().unwrap();
    let user = ChatMessage { role: "user".into(), content: "Hi".into() };
    let prompt = template.render(&[user], AddGenerationPrompt::Yes).unwrap();
    assert!(
        prompt.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"),
        "{prompt}"
    );
    assert!(prompt.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");
}

#[test]
fn a_syntax_error_is_found_when_the_template_is_compiled() {
    let error = ChatTemplate::new("{% for m in messages %}", None, None).unwrap_err();
    assert!(matches!(error, TextError::TemplateSyntax(_)), "{error}");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn limits_hold() {
    let endless = render("{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}");
    assert!(matches!(endless, Err(TextError::TemplateFuel { .. })), "{endless:?}");
    let long = render("{% set x = 'a' * 1000000 %}{% for i in range(100) %}{{ x }}{% endfor %}");
    assert!(
        matches!(long, Err(TextError::TemplateOutput { .. } | TextError::TemplateFuel { .. })),
        "{long:?}"
    );
    let short_steps = render("{% set x = 'a' * 100000 %}{% for i in range(168) %}{{ x }}{% endfor %}");
    assert!(matches!(short_steps, Err(TextError::TemplateOutput { .. })), "{short_steps:?}");
    for hostile in [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'chat_template' %}",
        "{{ 'x' * 99999999999 }}",
        "{% set ns = namespace(x=1) %}{% for i in range(5000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{{ '%999999999999d' | format(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(99999999999) | list }}",
        "{{ [1] | tojson(indent=999999999999) }}",
    ] {
        assert!(render(hostile).is_err(), "{hostile}");
    }
}

#[test]
fn an_exception_inside_a_macro_keeps_its_message() {
    let result =
        render("{% macro m() %}{{ raise_exception('no: ' ~ messages[0].role) }}{% endmacro %}{{ m() }}");
    assert!(
        matches!(&result, Err(TextError::TemplateRefused(message)) if message == "no: user"),
        "{result:?}"
    );
}

#[test]
fn the_date_is_available() {
    let year: i32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!((2024..3000).contains(&year), "{year}");
}
