//! `chatd`: settings, build, run, wait, drain.

use std::io::Write;
use std::process::ExitCode;

use chat_service::auth::command;
use chat_service::cli::{self, Command, EXIT_FAILURE, EXIT_USAGE};
use chat_service::server::Server;
use chat_service::settings::Settings;
use chat_service::{logging, server, tools};

/// A message is a dozen small pieces of memory, given back by other threads than took them. Debug builds keep the system's allocator: the
/// tests count what that gives.
#[cfg(not(debug_assertions))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many tasks a thread serves before it looks which sockets have something, at most.
const TASKS_BETWEEN_LOOKS: u32 = 31;
/// How many sockets it takes up then: no more than a thread's own queue has places. What is beyond would wait behind everything else.
const SOCKETS_AT_A_LOOK: usize = 256;

fn main() -> ExitCode {
    let flags = match cli::parse() {
        Command::Run(flags) => flags,
        Command::CheckConfig(flags) => return cli::check_config(&flags),
        Command::Passwd(flags, passwd) => {
            // The file may be named on the command line: settings that are wrong are no reason not to.
            let settings = Settings::load(&flags);
            return match (&settings, flags.config) {
                (Err(error), Some(_)) => fail(EXIT_USAGE, error),
                (settings, _) => {
                    let default = settings.as_ref().map(|settings| settings.auth.password_file.as_deref());
                    command::run(&passwd, default)
                }
            };
        }
        Command::Tool(flags, tool) => {
            return match Settings::load(&flags) {
                Ok(settings) => tools::run(&tool, &settings.storage.path),
                Err(error) => fail(EXIT_USAGE, &error),
            };
        }
    };
    let settings = match Settings::load(&flags) {
        Ok(settings) => settings,
        Err(error) => return fail(EXIT_USAGE, &error),
    };
    if let Err(error) = logging::init(&settings.log) {
        return fail(EXIT_FAILURE, &error);
    }
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("chatd")
        .event_interval(TASKS_BETWEEN_LOOKS)
        .max_io_events_per_tick(SOCKETS_AT_A_LOOK)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(EXIT_FAILURE, &error),
    };
    match runtime.block_on(serve(&settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_FAILURE, &format!("{error:#}")),
    }
}

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    let server = Server::start(settings).await?;
    // Before anybody is told that we are there, and may ask us to stop.
    let stop = server::stop_signal()?;
    // Whoever started us may not read: that is no reason to stop.
    let mut stdout = std::io::stdout();
    if let Err(error) = stdout.write_all(server.greeting().as_bytes()).and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "nobody reads the greeting");
    }
    server.run(stop).await
}

/// A connection is a file descriptor: take as many as the operating system allows this process.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("chatd: {error}");
    ExitCode::from(code)
}
