//! `chat completions` and `chat man`: made from the definition of the command line, so that they cannot say anything else.

use std::path::Path;

use clap::Command;
use clap_complete::Shell;

use crate::arguments::Form;
use crate::failure::Failure;
use crate::output::Output;

pub(super) async fn completions(command: &mut Command, shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "chat", &mut script);
    print(script).await
}

/// One page, or all of them in a folder.
pub(super) async fn manual(command: Command, folder: Option<&Path>) -> Result<(), Failure> {
    match folder {
        None => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(command).render(&mut page);
            rendered.map_err(|error| Failure::refused(error.to_string()))?;
            print(page).await
        }
        Some(folder) => {
            let written = std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command, folder));
            written.map_err(|error| Failure::refused(format!("{}: {error}", folder.display())))
        }
    }
}

async fn print(text: Vec<u8>) -> Result<(), Failure> {
    let text = String::from_utf8(text).map_err(|error| Failure::refused(error.to_string()))?;
    Output::new(Form { json: false }).print(text.trim_end().to_owned()).await.map(drop)
}
