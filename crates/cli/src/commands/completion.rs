//! `banger completion`.

use clap::Args;

use crate::cli::Context;
use crate::completion::registration;
use crate::error::Result;

/// Print the completion script of a shell
///
/// The script asks banger itself, so machines, images and kernels are completed as well.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  source <(banger completion bash)          # in ~/.bashrc\n  \
                        source <(banger completion zsh)           # in ~/.zshrc, after compinit\n  \
                        banger completion fish | source           # in ~/.config/fish/config.fish"
)]
pub(crate) struct CompletionArgs {
    /// Shell: bash, elvish, fish, powershell or zsh
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"], hide_possible_values = true)]
    shell: String,
}

impl CompletionArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.printer.data(registration(&self.shell)?)?;
        Ok(0)
    }
}
