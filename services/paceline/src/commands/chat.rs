//! `paceline chat`: a conversation with a running cluster, one turn a line of standard input.

use std::io::{BufRead as _, IsTerminal as _};

use anyhow::bail;
use clap::Args;
use paceline_wire::inference::{Chat, ChatMessage, generate_request::Input};
use tokio::sync::mpsc;

use crate::{
    answer::{connect, generate, request, served_model, write_stdout},
    commands::generate::ServerArgs,
    interrupt::Interrupts,
    options::{SamplingArgs, server_url},
};

/// A conversation with a running cluster: one line of standard input is one turn.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline chat
  paceline chat --system \"Answer in one sentence.\" --temperature 0
  printf 'Hello\\nAnd in French?\\n' | paceline chat

/reset forgets the conversation, /exit or the end of input ends it.")]
pub struct ChatArgs {
    /// First message, with the role system
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
///
/// # Errors
/// When the server does not answer or refuses, the model cannot chat, or the user interrupts.
pub async fn chat(args: &ChatArgs) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::listen()?;
    tokio::select! {
        result = converse(args) => result,
        signal = interrupts.next() => Err(signal.into()),
    }
}

async fn converse(args: &ChatArgs) -> anyhow::Result<()> {
    let mut client = connect(&server_url(&args.server.server)?).await?;
    let model = served_model(&mut client, args.server.model.as_deref()).await?;
    if !model.chat {
        bail!("`{}` has no chat template; use `paceline generate`", model.name);
    }
    let beginning: Vec<ChatMessage> =
        args.system.iter().map(|text| message("system", text.clone())).collect();
    let (mut messages, mut lines) = (beginning.clone(), stdin_lines());
    loop {
        if std::io::stdin().is_terminal() {
            eprint!("> ");
        }
        let Some(line) = lines.recv().await else { return Ok(()) };
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(()),
            "/reset" => messages.clone_from(&beginning),
            turn => {
                messages.push(message("user", turn.into()));
                let input = Input::Chat(Chat { messages: messages.clone() });
                let request = request(&model, input, &args.sampling)?;
                let answer = generate(&mut client, request, write_stdout).await?;
                write_stdout("\n")?;
                messages.push(message("assistant", answer.text));
            }
        }
    }
}

fn message(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.into(), content }
}

/// Lines by a thread of their own: a blocked read must not hold up Ctrl-C.
fn stdin_lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
