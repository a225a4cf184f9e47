//! `banger vm ports`.

use banger_proto::api::{ListeningPort, MachineState};
use clap::Args;
use futures_util::future::join_all;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Meant, machines, resolve};
use crate::completion;
use crate::error::{Error, Result};
use crate::table;

/// Show what listens in running machines, and where it is reached
///
/// A machine on the bridge is reached by its name, `NAME.vm`; any other through a forwarded port (`-p`). Ports that answer as HTTP are
/// shown as links. With --quiet only the endpoints, one a line.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm ports\n  banger vm ports web --json")]
pub(crate) struct PortsArgs {
    /// Machines by name, id or unambiguous prefix; all that run otherwise
    #[arg(value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Deserialize)]
struct Ports {
    ports: Vec<ListeningPort>,
}

impl PortsArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let found = context.block_on(async {
            let client = Client::new(&context.places)?;
            let all = machines(&client).await?;
            let wanted = if self.machines.is_empty() {
                all.into_iter()
                    .filter(|m| m.state == MachineState::Running)
                    .map(Ok)
                    .collect()
            } else {
                resolve(&self.machines, &all, Meant::Loosely)
            };
            let ports = wanted.into_iter().map(|machine| async {
                let client = client.another();
                let path = format!("{}/ports", machine_path(&machine?.id));
                client.get::<Ports>(&path).await.map(|p| p.ports)
            });
            Ok(join_all(ports).await)
        })?;
        let (ports, failures): (Vec<_>, Vec<_>) = found.into_iter().partition(Result::is_ok);
        let none = ports.is_empty() && !failures.is_empty();
        let ports: Vec<ListeningPort> = ports.into_iter().flatten().flatten().collect();
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&ports.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if printer.quiet {
            let endpoints = ports.iter().filter_map(|p| p.endpoint.as_ref());
            printer.data(endpoints.map(|e| format!("{e}\n")).collect::<String>())?;
        } else if !none {
            printer.data(render(&ports))?;
        }
        let mut failures: Vec<Error> = failures.into_iter().filter_map(Result::err).collect();
        let Some(first) = (!failures.is_empty()).then(|| failures.remove(0)) else {
            return Ok(0);
        };
        failures.iter().for_each(|e| printer.error(e));
        Err(first)
    }
}

fn render(ports: &[ListeningPort]) -> String {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let rows = ports.iter().map(|p| {
        vec![
            p.machine.clone(),
            p.port.to_string(),
            p.address.clone(),
            or_dash(&p.process),
            or_dash(p.url.as_ref().map_or(&p.endpoint, |_| &p.url)),
        ]
    });
    table::render(&["MACHINE", "PORT", "LISTENS ON", "PROCESS", "REACHED AT"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stand_where_there_are_some() {
        let port = |port, endpoint: Option<&str>, url: Option<&str>| ListeningPort {
            id: "0123456789abcdef".into(),
            machine: "web".into(),
            port,
            address: "0.0.0.0".into(),
            process: (port == 80).then(|| "nginx".into()),
            endpoint: endpoint.map(str::to_owned),
            url: url.map(str::to_owned),
        };
        let ports = [
            port(22, None, None),
            port(80, Some("web.vm:80"), Some("http://web.vm:80/")),
            port(443, Some("web.vm:443"), None),
        ];
        assert_eq!(
            render(&ports),
            "MACHINE  PORT  LISTENS ON  PROCESS  REACHED AT\n\
             web      22    0.0.0.0     -        -\n\
             web      80    0.0.0.0     nginx    http://web.vm:80/\n\
             web      443   0.0.0.0     -        web.vm:443\n"
        );
    }
}
