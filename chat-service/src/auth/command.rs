//! `chatd passwd`: adds users to the password file, removes them, and checks a password.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use chat_protocol::UserId;

use super::Role;
use super::passwords::{IsNew, PASSWORD_BYTES_MAX, PasswordFile, PasswordFileError, User};
use crate::cli::{EXIT_FAILURE, EXIT_USAGE};
use crate::settings::SettingsError;

/// What is to be done to the password file.
#[derive(Clone, Debug, PartialEq, Eq, clap::Subcommand)]
pub enum Passwd {
    /// Add a user, or give one another password. The password is asked for, or read from the standard input.
    Add {
        name: UserId,
        /// observer, bridge or admin; may be given several times. Without it a user keeps the roles that they have.
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<Role>,
        #[command(flatten)]
        file: PasswordFilePath,
    },
    /// Remove a user.
    Remove {
        name: UserId,
        #[command(flatten)]
        file: PasswordFilePath,
    },
    /// Is this the user's password? Exit code 0: yes; 1: no.
    Check {
        name: UserId,
        #[command(flatten)]
        file: PasswordFilePath,
    },
}

/// Where the users are.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct PasswordFilePath {
    /// The password file [default: auth.password_file of the settings]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Does it. `default`: the file of the settings, which need not be right if it is not asked for.
pub fn run(command: &Passwd, default: Result<Option<&Path>, &SettingsError>) -> ExitCode {
    let (Passwd::Add { file, .. } | Passwd::Remove { file, .. } | Passwd::Check { file, .. }) = command;
    let path = match (file.file.as_deref(), default) {
        (Some(path), _) | (None, Ok(Some(path))) => path,
        (None, Ok(None)) => {
            eprintln!("chatd: which file? Name it with --file, or set auth.password_file");
            return ExitCode::from(EXIT_USAGE);
        }
        (None, Err(error)) => {
            eprintln!("chatd: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let done = match command {
        Passwd::Add { name, roles, .. } => add(path, name, roles),
        Passwd::Remove { name, .. } => remove(path, name),
        Passwd::Check { name, .. } => check(path, name),
    };
    match done {
        Ok(sentence) => {
            eprintln!("{sentence}");
            ExitCode::SUCCESS
        }
        Err(sentence) => {
            eprintln!("chatd: {sentence}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn add(path: &Path, name: &UserId, roles: &[Role]) -> Result<String, String> {
    // Whoever is about to type a password hears of a file that is wrong before.
    match PasswordFile::read(path) {
        Err(PasswordFileError::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {}
        read => drop(read.map_err(|error| error.to_string())?),
    }
    // Nobody waits for whoever types.
    let mut user = User::with_password(&ask(name, true)?, roles.to_vec());
    let put = |users: &mut PasswordFile| {
        if user.roles.is_empty() {
            user.roles = users.get(name).map(|before| before.roles.clone()).unwrap_or_default();
        }
        Some(users.put(name.clone(), user))
    };
    let new = PasswordFile::change(path, IsNew::Perhaps, put).map_err(|error| error.to_string())?;
    let done = if new == Some(true) { "was added to" } else { "has another password in" };
    Ok(format!("{name} {done} {}; a chatd that runs reads it on SIGHUP", path.display()))
}

fn remove(path: &Path, name: &UserId) -> Result<String, String> {
    let remove = |users: &mut PasswordFile| users.remove(name).then_some(());
    let removed = PasswordFile::change(path, IsNew::No, remove).map_err(|error| error.to_string())?;
    if removed.is_none() {
        return Err(format!("there is no {name} in {}", path.display()));
    }
    Ok(format!("{name} was removed from {}; a chatd that runs reads it on SIGHUP", path.display()))
}

fn check(path: &Path, name: &UserId) -> Result<String, String> {
    let users = PasswordFile::read(path).map_err(|error| error.to_string())?;
    let user = users.get(name).ok_or_else(|| format!("there is no {name} in {}", path.display()))?;
    if user.is_password(&ask(name, false)?) {
        Ok(format!("this is the password of {name}"))
    } else {
        Err(format!("this is not the password of {name}"))
    }
}

/// A password: unseen on a terminal, else the first line of the standard input.
fn ask(name: &UserId, twice: bool) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("the password cannot be read: {error}");
    let password = if std::io::stdin().is_terminal() {
        let password = rpassword::prompt_password(format!("Password for {name}: ")).map_err(failed)?;
        if twice && rpassword::prompt_password("Once more: ").map_err(failed)? != password {
            return Err("these are two passwords; nothing was changed".to_owned());
        }
        password
    } else {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map_err(failed)?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    if password.is_empty() {
        return Err("the password is empty; nothing was changed".to_owned());
    }
    if password.len() > PASSWORD_BYTES_MAX {
        return Err(format!("a password has at most {PASSWORD_BYTES_MAX} bytes"));
    }
    Ok(password.into_bytes())
}
