//! `banger vm create`, and what `banger vm run` shares with it.

use banger_core::{argument, spec};
use banger_proto::api::{Accepted, CreateMachine, Machine};
use banger_proto::error::ErrorCode;
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{SpecArgs, WaitArgs, forwards};
use crate::completion;
use crate::error::{Error, Kind, Result};
use crate::signals::Signals;

/// Make a machine and start it
///
/// Prints its name. What is not given comes from the configuration, and from what the host has.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm create debian --name build --vcpu 2 --memory 2G\n  \
                        banger vm create --name web -p 8080:80\n  name=$(banger vm create --quiet)"
)]
pub(crate) struct CreateArgs {
    /// Image to start from; `debian` unless the configuration says otherwise
    #[arg(value_name = "IMAGE", add = completion::images())]
    positional: Option<String>,
    #[command(flatten)]
    spec: SpecArgs,
    /// Only make it, do not start it
    #[arg(long, conflicts_with = "cold")]
    no_start: bool,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl CreateArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        if let Some(path) = self.positional.as_ref().filter(|p| argument::is_path(p)) {
            return Err(Error::usage(format!("`{path}` is a path, not an image"))
                .hint("`banger vm run` takes a workspace; `banger vm create` does not"));
        }
        let hint = self.positional.as_ref().and_then(|image| directory_hint(image));
        let mut request = self.spec.request(self.positional, &self.wait)?;
        request.start = self.no_start.then_some(false);
        let machine = context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut signals = Signals::ending()?;
            let created = create(context, &client, &request, &mut signals, |_| {}).await;
            let machine = created.map_err(|e| with_directory_hint(e, hint))?;
            if self.output.json() {
                // As it is now that it runs. Its name was known before.
                return client.get::<Machine>(&machine_path(&machine.id)).await;
            }
            Ok(machine)
        })?;
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.line(machine.name)?;
        }
        Ok(0)
    }
}

/// The hint for an image argument that is also the name of a directory here.
pub(crate) fn directory_hint(image: &str) -> Option<String> {
    argument::hint_for_directory(image, |name| std::path::Path::new(name).is_dir())
}

/// The hint goes on an error that says the image is unknown.
pub(crate) fn with_directory_hint(mut error: Error, hint: Option<String>) -> Error {
    if error.is(ErrorCode::NotFound) && hint.is_some() {
        error.hint = hint;
    }
    error
}

/// Creates a machine and follows that to its end. `accepted` learns of the machine as soon as it has an id.
pub(crate) async fn create(
    context: &Context,
    client: &Client,
    request: &CreateMachine,
    signals: &mut Signals,
    accepted: impl FnOnce(&Machine),
) -> Result<Machine> {
    let Accepted { operation, machine } = client.post("machines", request).await?;
    let machine = machine.ok_or_else(|| Error::failed("the daemon accepted a machine without saying which"))?;
    accepted(&machine);
    context.printer.note(format!("spec: {}", spec::line(&machine.spec)));
    if !machine.forwards.is_empty() {
        context.printer.note(format!("ports: {}", forwards(&machine)));
    }
    let mut activity = context.printer.activity("vm create");
    let followed = follow(client, operation, Leaving::Cancels, &mut activity, signals).await;
    drop(activity);
    match followed {
        Ok(_) => Ok(machine),
        Err(error) => Err(explain(client, &machine, error).await),
    }
}

/// A machine whose start took too long is kept, so that its console can be looked at; says so.
async fn explain(client: &Client, machine: &Machine, error: Error) -> Error {
    if error.kind != Kind::Timeout {
        return error;
    }
    match client.sibling().get::<Machine>(&machine_path(&machine.id)).await {
        Ok(_) => {
            let name = &machine.name;
            error.hint(format!(
                "the machine is kept: look at `banger vm logs {name}`, remove it with `banger vm delete {name}`"
            ))
        }
        Err(_) => error,
    }
}
