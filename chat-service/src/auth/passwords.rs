//! The password file: a line for each user, `name:$argon2id$…` and perhaps `:role,role`.
//!
//! A file with a line that is wrong is refused whole: a line that is misread could let somebody in. It is written to a new file that takes the
//! old one's place, so nobody ever reads half of it. Whoever changes it has it locked from reading to writing, so no change undoes another.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use broker::service::Credential;
use chat_protocol::UserId;

use super::{Role, fingerprint};

/// Cost of a hash: 19 MiB, two passes, one lane, as OWASP recommends for argon2id.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// A file may ask for as much and no more: whoever logs in makes the server work.
const MEMORY_KIB_MAX: u32 = 256 * 1024;
const PASSES_MAX: u32 = 16;
/// Longest password, in bytes.
pub(super) const PASSWORD_BYTES_MAX: usize = 1_024;

/// What is wrong with a password file.
#[derive(Debug, thiserror::Error)]
pub enum PasswordFileError {
    /// It cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    /// A line is not what it has to be.
    #[error("{}, line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
}

/// A user on file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// In PHC form.
    hash: String,
    pub(super) roles: Vec<Role>,
}

impl User {
    /// With a password and a salt of its own.
    pub fn with_password(password: &[u8], roles: Vec<Role>) -> Self {
        let hash = hasher().hash_password(password).expect("a password of any length can be hashed");
        Self { hash: hash.to_string(), roles }
    }

    /// Somebody whom no password lets in, and whose hash costs as much as another one.
    fn impostor(Costs { memory_kib, passes, lanes }: Costs) -> Self {
        let bytes = || -> Vec<u8> { (0..32).map(|_| fastrand::u8(..)).collect() };
        let encoded = |bytes: &[u8]| BASE64.encode(bytes);
        let (salt, hash) = (encoded(&bytes()[..16]), encoded(&bytes()));
        let hash = format!("$argon2id$v=19$m={memory_kib},t={passes},p={lanes}${salt}${hash}");
        Self { hash, roles: Vec::new() }
    }

    /// What its hash costs.
    fn costs(&self) -> Option<Costs> {
        let params = Params::try_from(&PasswordHash::new(&self.hash).ok()?).ok()?;
        Some(Costs { memory_kib: params.m_cost(), passes: params.t_cost(), lanes: params.p_cost() })
    }

    /// Another one with every password that was set.
    pub(super) fn credential(&self) -> Credential {
        fingerprint(&[self.hash.as_bytes()])
    }

    /// Whether this is the password. Takes some 20 ms and 19 MiB, by design.
    pub fn is_password(&self, password: &[u8]) -> bool {
        PasswordHash::new(&self.hash).is_ok_and(|hash| hasher().verify_password(password, &hash).is_ok())
    }
}

/// What a hash costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Costs {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl Costs {
    const USUAL: Self = Self { memory_kib: MEMORY_KIB, passes: PASSES, lanes: LANES };
}

fn hasher() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("costs that argon2 takes");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// The users of a password file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PasswordFile {
    users: BTreeMap<UserId, User>,
    /// Lines that begin with `#`.
    comments: Vec<String>,
}

impl PasswordFile {
    /// # Errors
    /// [`PasswordFileError`] for the first thing that is wrong.
    pub fn read(path: &Path) -> Result<Self, PasswordFileError> {
        let cause = |cause| PasswordFileError::Io { path: path.to_owned(), cause };
        let text = fs::read_to_string(path).map_err(cause)?;
        let metadata = fs::metadata(path).map_err(cause)?;
        if metadata.permissions().mode() & 0o007 != 0 {
            tracing::warn!(path = %path.display(), "everybody on this machine may read the password file: chmod 640");
        }
        Self::parse(&text).map_err(|(line, reason)| PasswordFileError::Line { path: path.to_owned(), line, reason })
    }

    /// Reads it, changes it and writes it, while nobody else does. `is_new`: it need not be there.
    ///
    /// # Errors
    /// It cannot be locked, read or written, or has a line that is wrong; it is as it was.
    pub fn change<T>(
        path: &Path,
        is_new: IsNew,
        change: impl FnOnce(&mut Self) -> Option<T>,
    ) -> Result<Option<T>, PasswordFileError> {
        let _lock = lock(path, is_new).map_err(|cause| PasswordFileError::Io { path: path.to_owned(), cause })?;
        let mut file = Self::read(path)?;
        let changed = change(&mut file);
        if changed.is_some() {
            file.write(path)?;
        }
        Ok(changed)
    }

    /// `Err` with the number of the line that is wrong, and why.
    pub fn parse(text: &str) -> Result<Self, (usize, String)> {
        let (mut users, mut comments) = (BTreeMap::new(), Vec::new());
        for (number, line) in (1..).zip(text.lines()) {
            if line.starts_with('#') {
                comments.push(line.to_owned());
            }
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, user) = parse_line(line).map_err(|reason| (number, reason))?;
            if users.insert(name.clone(), user).is_some() {
                return Err((number, format!("{name} was there before")));
            }
        }
        Ok(Self { users, comments })
    }

    pub fn get(&self, name: &UserId) -> Option<&User> {
        self.users.get(name)
    }

    /// Whoever is not on file is checked against this, so that it takes as long as for most of those who are.
    pub fn nobody(&self) -> User {
        let mut counted = BTreeMap::<Costs, usize>::new();
        for costs in self.users.values().filter_map(User::costs) {
            *counted.entry(costs).or_default() += 1;
        }
        let most = counted.into_iter().max_by_key(|(_, count)| *count);
        User::impostor(most.map_or(Costs::USUAL, |(costs, _)| costs))
    }

    pub fn has(&self, name: &UserId) -> bool {
        self.users.contains_key(name)
    }

    /// Adds a user or replaces the one of this name.
    pub fn put(&mut self, name: UserId, user: User) -> bool {
        self.users.insert(name, user).is_none()
    }

    /// `false` if there was none.
    pub fn remove(&mut self, name: &UserId) -> bool {
        self.users.remove(name).is_some()
    }

    /// # Errors
    /// It could not be written; the old file is as it was.
    pub fn write(&self, path: &Path) -> Result<(), PasswordFileError> {
        let mut text: String = self.comments.iter().map(|line| format!("{line}\n")).collect();
        for (name, User { hash, roles }) in &self.users {
            let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
            let separator = if roles.is_empty() { "" } else { ":" };
            text.push_str(&format!("{name}:{hash}{separator}{}\n", roles.join(",")));
        }
        replace(path, text.as_bytes()).map_err(|cause| PasswordFileError::Io { path: path.to_owned(), cause })
    }
}

/// Whether a file may be one that nobody has written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsNew {
    Perhaps,
    No,
}

/// Locks the file that is there now: the one before may have been replaced while its lock was waited for.
fn lock(path: &Path, is_new: IsNew) -> std::io::Result<fs::File> {
    loop {
        let mut options = fs::OpenOptions::new();
        let opened = options.read(true).write(true).create(is_new == IsNew::Perhaps).mode(0o600).open(path);
        // Whoever may not write to it may perhaps replace it.
        let file = opened.or_else(|error| match error.kind() {
            ErrorKind::PermissionDenied => fs::File::open(path),
            _ => Err(error),
        })?;
        file.lock()?;
        let locked = file.metadata()?;
        match fs::metadata(path) {
            Ok(now) if (now.dev(), now.ino()) == (locked.dev(), locked.ino()) => return Ok(file),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
}

/// Writes beside the file, to the disk, and puts that in its place, with the rights and the owner of the old one. A link goes on leading there.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let path = &match fs::canonicalize(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => path.to_owned(),
        real => real?,
    };
    let old = fs::metadata(path).ok();
    let mode = old.as_ref().map_or(0o600, |metadata| metadata.permissions().mode() & 0o777);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        if let Some(old) = &old {
            let new = file.metadata()?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
            }
        }
        // Last, and whatever the umask: the new owner may be the one whom it lets read.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        // What is left of it helps nobody.
        fs::remove_file(&new).unwrap_or(());
    }
    written
}

fn parse_line(line: &str) -> Result<(UserId, User), String> {
    let mut parts = line.split(':');
    let (name, hash, roles) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    if parts.next().is_some() {
        return Err("it has more than name, hash and roles".to_owned());
    }
    let name = UserId::parse(name).map_err(|error| format!("{name:?}: {error}"))?;
    let Some(hash) = hash else { return Err(format!("{name} has no hash: a line is name:hash or name:hash:roles")) };
    check_hash(hash).map_err(|reason| format!("the hash of {name}: {reason}"))?;
    let roles = roles.into_iter().flat_map(|roles| roles.split(','));
    let roles = roles.map(|role| role.parse().map_err(|reason| format!("{name}: {reason}")));
    let roles = roles.collect::<Result<_, String>>()?;
    Ok((name, User { hash: hash.to_owned(), roles }))
}

fn check_hash(hash: &str) -> Result<(), String> {
    let parsed = PasswordHash::new(hash).map_err(|error| format!("it is not $argon2id$… ({error})"))?;
    if parsed.algorithm.as_str() != "argon2id" {
        return Err(format!("it is {}; only argon2id is taken: chatd passwd add", parsed.algorithm));
    }
    if parsed.salt.is_none() || parsed.hash.is_none() {
        return Err("it is cut short".to_owned());
    }
    let params = Params::try_from(&parsed).map_err(|error| error.to_string())?;
    if params.m_cost() > MEMORY_KIB_MAX || params.t_cost() > PASSES_MAX {
        return Err(format!("it costs more than {MEMORY_KIB_MAX} KiB or {PASSES_MAX} passes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    fn cheap(password: &[u8]) -> String {
        let params = Params::new(64, 1, 1, None).unwrap();
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params).hash_password(password).unwrap().to_string()
    }

    #[test]
    fn passwords_are_checked() {
        let user = User::with_password(b"secret", vec![Role::Observer]);
        assert!(user.is_password(b"secret"));
        for wrong in [&b"Secret"[..], b"", b"secret\0", b"secret "] {
            assert!(!user.is_password(wrong), "{wrong:?}");
        }
        assert!(user.hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{}", user.hash);
        assert_ne!(user.hash, User::with_password(b"secret", Vec::new()).hash, "each has a salt of its own");
    }

    #[test]
    fn nobody_costs_as_much_as_most_do() {
        assert_eq!(PasswordFile::default().nobody().costs(), Some(Costs::USUAL));
        let text = format!("a:{}\nb:{}\nc:{}\n", cheap(b"a"), cheap(b"b"), User::with_password(b"c", Vec::new()).hash);
        let nobody = PasswordFile::parse(&text).unwrap().nobody();
        assert_eq!(nobody.costs(), Some(Costs { memory_kib: 64, passes: 1, lanes: 1 }));
        assert_eq!(check_hash(&nobody.hash), Ok(()), "{}", nobody.hash);
        assert!(!nobody.is_password(b"") && !nobody.is_password(b"a"));
    }

    #[test]
    fn a_new_password_is_another_credential() {
        let (one, other) = (User::with_password(b"a", Vec::new()), User::with_password(b"a", Vec::new()));
        assert_ne!(one.credential(), other.credential());
        assert_eq!(one.credential(), User { roles: vec![Role::Admin], ..one.clone() }.credential());
    }

    #[test]
    fn a_file_comes_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let mut file = PasswordFile { comments: vec!["# ours".to_owned()], ..PasswordFile::default() };
        assert!(file.put(name("bob"), User { hash: cheap(b"b"), roles: Vec::new() }));
        assert!(file.put(name("eve"), User { hash: cheap(b"e"), roles: vec![Role::Observer, Role::Bridge] }));
        file.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(PasswordFile::read(&path).unwrap(), file);
        assert!(file.remove(&name("bob")) && !file.remove(&name("bob")));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        file.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640, "the rights stay");
        let read = PasswordFile::read(&path).unwrap();
        assert!(!read.has(&name("bob")) && read.get(&name("eve")).unwrap().is_password(b"e"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_link_goes_on_leading_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (link, path) = (folder.path().join("link"), folder.path().join("passwords"));
        std::os::unix::fs::symlink("passwords", &link).unwrap();
        let put = |one: &str| {
            let user = User { hash: cheap(b"x"), roles: Vec::new() };
            PasswordFile::change(&link, IsNew::Perhaps, |file| Some(file.put(name(one), user))).unwrap()
        };
        // At first it leads nowhere.
        assert_eq!((put("bob"), put("eve"), put("bob")), (Some(true), Some(true), Some(false)));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(PasswordFile::read(&path).unwrap().users.len(), 2);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside them");
    }

    #[test]
    fn a_change_does_not_undo_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = &folder.path().join("passwords");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for nth in 0..25 {
                        let user = User { hash: cheap(b"x"), roles: Vec::new() };
                        let put = |file: &mut PasswordFile| Some(file.put(name(&format!("u-{thread}-{nth}")), user));
                        assert_eq!(PasswordFile::change(path, IsNew::Perhaps, put).unwrap(), Some(true));
                    }
                });
            }
        });
        assert_eq!(PasswordFile::read(path).unwrap().users.len(), 100);
        let untouched = fs::metadata(path).unwrap().ino();
        assert_eq!(PasswordFile::change(path, IsNew::No, |_| None::<()>).unwrap(), None);
        assert_eq!(fs::metadata(path).unwrap().ino(), untouched, "nothing to write");
        let missing = PasswordFile::change(&folder.path().join("missing"), IsNew::No, |_| Some(()));
        assert!(matches!(missing, Err(PasswordFileError::Io { .. })), "{missing:?}");
    }

    #[test]
    fn a_line_that_is_wrong_refuses_the_file() {
        let hash = cheap(b"x");
        for (wrong, part) in [
            ("bob".to_owned(), "no hash"),
            ("bob:".to_owned(), "argon2id"),
            (":".to_owned(), "user name"),
            (format!("Bob:{hash}"), "user name"),
            (format!("+:{hash}"), "user name"),
            (format!(" bob:{hash}"), "user name"),
            (format!("bob:{hash}:king"), "king"),
            (format!("bob:{hash}:"), "role"),
            (format!("bob:{hash}:observer:x"), "more than"),
            (format!("bob:{hash} "), "hash of bob"),
            ("bob:secret".to_owned(), "argon2id"),
            ("bob:$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW".to_owned(), "hash of bob"),
            ("bob:$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHRzYWx0".to_owned(), "cut short"),
            (format!("bob:{}", hash.replace("argon2id", "argon2i")), "only argon2id"),
            (format!("bob:{}", hash.replace("m=64", "m=4000000")), "costs more"),
        ] {
            let (line, reason) = PasswordFile::parse(&format!("# users\neve:{hash}\n{wrong}\n")).unwrap_err();
            assert!(line == 3 && reason.contains(part), "{wrong}: {line}, {reason}");
        }
        let twice = format!("bob:{hash}\nbob:{hash}\n");
        assert_eq!(PasswordFile::parse(&twice).unwrap_err(), (2, "bob was there before".to_owned()));
    }

    proptest! {
        #[test]
        fn no_file_panics_or_lets_a_name_in_that_none_is(text in "([a-zA-Z0-9+#:$,=/ \\n-]|\\PC){0,200}") {
            if let Ok(file) = PasswordFile::parse(&text) {
                for user in file.users.values() {
                    prop_assert!(check_hash(&user.hash).is_ok());
                }
            }
        }
    }
}
