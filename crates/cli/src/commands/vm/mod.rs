//! `banger vm`: machines.

use clap::{Args, Subcommand};

use crate::cli::Context;
use crate::error::Result;

pub(crate) mod attach;
pub(crate) mod commit;
pub(crate) mod common;
pub(crate) mod cp;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod ports;
pub(crate) mod prune;
pub(crate) mod recover;
pub(crate) mod rename;
pub(crate) mod run;
pub(crate) mod sessions;
pub(crate) mod set;
pub(crate) mod shell;
pub(crate) mod show;
pub(crate) mod snapshot;
pub(crate) mod ssh;
pub(crate) mod state;
pub(crate) mod stats;
pub(crate) mod wait;

/// Make and use machines
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger vm run ./repo -- make test\n  banger vm create debian --name build\n  \
                  banger vm exec build -- apt-get update"
)]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    command: VmCommand,
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    Run(run::RunArgs),
    Create(create::CreateArgs),
    Start(state::StartArgs),
    Stop(state::StopArgs),
    Restart(state::RestartArgs),
    Kill(state::KillArgs),
    Pause(state::PauseArgs),
    Resume(state::ResumeArgs),
    Suspend(state::SuspendArgs),
    Snapshot(snapshot::SnapshotArgs),
    Fork(fork::ForkArgs),
    Commit(commit::CommitArgs),
    #[command(visible_alias = "rm")]
    Delete(delete::DeleteArgs),
    Prune(prune::PruneArgs),
    #[command(visible_alias = "ls")]
    List(list::ListArgs),
    Show(show::ShowArgs),
    Shell(shell::ShellArgs),
    Exec(exec::ExecArgs),
    Attach(attach::AttachArgs),
    Sessions(sessions::SessionsArgs),
    Ssh(ssh::SshArgs),
    Cp(cp::CpArgs),
    Logs(logs::LogsArgs),
    Stats(stats::StatsArgs),
    Ports(ports::PortsArgs),
    Set(set::SetArgs),
    Rename(rename::RenameArgs),
    Recover(recover::RecoverArgs),
    Wait(wait::WaitForArgs),
}

impl VmArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            VmCommand::Run(args) => args.run(context),
            VmCommand::Create(args) => args.run(context),
            VmCommand::Start(args) => args.run(context),
            VmCommand::Stop(args) => args.run(context),
            VmCommand::Restart(args) => args.run(context),
            VmCommand::Kill(args) => args.run(context),
            VmCommand::Pause(args) => args.run(context),
            VmCommand::Resume(args) => args.run(context),
            VmCommand::Suspend(args) => args.run(context),
            VmCommand::Snapshot(args) => args.run(context),
            VmCommand::Fork(args) => args.run(context),
            VmCommand::Commit(args) => args.run(context),
            VmCommand::Delete(args) => args.run(context),
            VmCommand::Prune(args) => args.run(context),
            VmCommand::List(args) => args.run(context),
            VmCommand::Show(args) => args.run(context),
            VmCommand::Shell(args) => args.run(context),
            VmCommand::Exec(args) => args.run(context),
            VmCommand::Attach(args) => args.run(context),
            VmCommand::Sessions(args) => args.run(context),
            VmCommand::Ssh(args) => args.run(context),
            VmCommand::Cp(args) => args.run(context),
            VmCommand::Logs(args) => args.run(context),
            VmCommand::Stats(args) => args.run(context),
            VmCommand::Ports(args) => args.run(context),
            VmCommand::Set(args) => args.run(context),
            VmCommand::Rename(args) => args.run(context),
            VmCommand::Recover(args) => args.run(context),
            VmCommand::Wait(args) => args.run(context),
        }
    }
}
