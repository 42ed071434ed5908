//! Who may come in: passwords on file, tokens, or in development everybody.
//!
//! Whoever is refused hears the same sentence after the same work, whether the name is known or not. Hashing a password is expensive by
//! design, so only so many are hashed at a time and only so many may wait; everything else goes on beside it.

pub mod command;
mod guesses;
pub mod passwords;
pub mod tokens;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker::service::{Authentication, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Identity, Peer, Roles};
use chat_protocol::UserId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use self::guesses::Guesses;
use self::passwords::{PASSWORD_BYTES_MAX, PasswordFile, PasswordFileError, User};
use self::tokens::{Claims, KeyError, Proof, Tokens};
use crate::settings::{AuthMode, AuthSettings};

/// The MQTT 5 authentication method that carries a token in CONNECT and renews it in AUTH.
pub const TOKEN_METHOD: &str = "JWT";
/// Passwords that are hashed at a time, and that wait for it.
const HASHING_MAX: usize = 2;
const WAITING_MAX: usize = 64;
/// A failed login is answered so much later.
const FAILURE_DELAY: Duration = Duration::from_secs(1);

/// What somebody may do besides chatting under their own name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Read what everybody writes.
    Observer,
    /// Act for others: publish below their branch.
    Bridge,
    /// Everything that an operator may do over MQTT.
    Admin,
}

impl Role {
    const ALL: [Self; 3] = [Self::Observer, Self::Bridge, Self::Admin];

    /// As files and claims write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Observer => "observer",
            Self::Bridge => "bridge",
            Self::Admin => "admin",
        }
    }

    const fn bit(self) -> u32 {
        match self {
            Self::Observer => 1,
            Self::Bridge => 2,
            Self::Admin => 4,
        }
    }

    /// Whether it is among these.
    pub fn is_in(self, roles: Roles) -> bool {
        roles.0 & self.bit() != 0
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == name);
        found.ok_or_else(|| format!("{name:?} is no role; the roles are observer, bridge, admin"))
    }
}

/// What the files said when they were read last.
struct Files {
    passwords: Option<PasswordFile>,
    tokens: Option<Tokens>,
}

/// Why a file of [`AuthSettings`] was refused.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("auth.password_file: {0}")]
    Passwords(#[from] PasswordFileError),
    #[error("auth.jwt_key_file: {0}")]
    Keys(#[from] KeyError),
}

/// Who may come in.
pub struct Auth {
    mode: AuthMode,
    observers: Vec<UserId>,
    password_path: Option<PathBuf>,
    key_path: Option<PathBuf>,
    takes_certificates: bool,
    claims: Claims,
    files: RwLock<Arc<Files>>,
    guesses: Mutex<Guesses>,
    hashing: Semaphore,
    waiting: Semaphore,
    /// Whoever is not on file is checked against this, so that it takes as long.
    nobody: User,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Auth {
    /// # Errors
    /// A file cannot be read, or is not what it has to be.
    pub fn new(settings: &AuthSettings, takes_certificates: bool) -> Result<Self, AuthError> {
        let claims = Claims {
            audience: settings.jwt_audience.clone(),
            issuer: settings.jwt_issuer.clone(),
            roles: settings.jwt_roles_claim.clone(),
        };
        let auth = Self {
            mode: settings.mode,
            observers: settings.observers.clone(),
            password_path: settings.password_file.clone(),
            key_path: settings.jwt_key_file.clone(),
            takes_certificates,
            claims,
            files: RwLock::new(Arc::new(Files { passwords: None, tokens: None })),
            guesses: Mutex::default(),
            hashing: Semaphore::new(HASHING_MAX),
            waiting: Semaphore::new(HASHING_MAX + WAITING_MAX),
            nobody: User::with_password(b"", Vec::new()),
        };
        auth.reload()?;
        Ok(auth)
    }

    /// Everybody may come in.
    #[cfg(test)]
    pub(crate) fn development() -> Arc<Self> {
        let settings = AuthSettings {
            mode: AuthMode::Development,
            password_file: None,
            jwt_key_file: None,
            jwt_audience: String::new(),
            jwt_issuer: String::new(),
            jwt_roles_claim: String::new(),
            observers: Vec::new(),
        };
        Arc::new(Self::new(&settings, false).expect("no file is read"))
    }

    /// Reads the files again. If one of them is wrong everything stays as it was.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it has to be.
    pub fn reload(&self) -> Result<(), AuthError> {
        if self.mode == AuthMode::Development {
            return Ok(());
        }
        let passwords = self.password_path.as_deref().map(PasswordFile::read).transpose()?;
        let tokens = self.key_path.as_deref().map(|path| Tokens::read(path, self.claims.clone())).transpose()?;
        *self.files.write() = Arc::new(Files { passwords, tokens });
        Ok(())
    }

    fn files(&self) -> Arc<Files> {
        Arc::clone(&self.files.read())
    }

    /// `false` if it is certain that there is no such user: the password file has all of them, and not this one.
    pub fn may_exist(&self, user: &UserId) -> bool {
        let files = self.files.read();
        match (&files.passwords, &files.tokens) {
            (Some(passwords), None) if !self.takes_certificates => passwords.has(user),
            _ => true,
        }
    }

    /// Whether topics outside `chat/` are everybody's.
    pub fn is_open(&self) -> bool {
        self.mode == AuthMode::Development
    }

    /// Who asks to come in, or why not.
    pub async fn connect(&self, request: &ConnectRequest<'_>) -> Result<Identity, ConnectRefusal> {
        let client_id = request.client_id;
        if self.mode == AuthMode::Development {
            if request.authentication.is_some() {
                return Err(method_refused());
            }
            return named(request).map(|user| self.identity(user, client_id, &[], None));
        }
        if let Some(authentication) = request.authentication {
            let proof = self.prove(request.peer, authentication).await?;
            return Ok(self.identity(proof.user, client_id, &proof.roles, Some(proof.expires_at)));
        }
        let address = address(request.peer);
        if let (Some(name), None) = (&request.peer.certificate_name, request.password) {
            return by_certificate(name, request.user_name).map(|user| self.identity(user, client_id, &[], None));
        }
        let Some(password) = request.password else {
            return Err(refuse(
                ConnectRefusalCode::BadUserNameOrPassword,
                "user name and password, or a token as password, are needed",
            ));
        };
        if self.files().tokens.is_some() && Tokens::is_token(password) {
            let proof = self.prove_token(address, password).await?;
            // Empty: whoever the token is about.
            if request.user_name.is_some_and(|name| !name.is_empty() && name != proof.user.as_str()) {
                let sentence = "the token is another user's than the user name";
                return Err(refuse(ConnectRefusalCode::BadUserNameOrPassword, sentence));
            }
            return Ok(self.identity(proof.user, client_id, &proof.roles, Some(proof.expires_at)));
        }
        let name = request.user_name.unwrap_or_default();
        let (user, roles) = self.check_password(address, name, password).await?;
        Ok(self.identity(user, client_id, &roles, None))
    }

    /// The same user proves again who they are.
    pub async fn authenticate_again(
        &self,
        peer: &Peer,
        identity: &Identity,
        authentication: &Authentication,
    ) -> Result<Identity, ConnectRefusal> {
        let proof = self.prove(peer, authentication).await?;
        if *identity.user != *proof.user.as_str() {
            return Err(refuse(ConnectRefusalCode::NotAuthorized, "the token is another user's"));
        }
        Ok(self.identity(proof.user, &identity.client_id, &proof.roles, Some(proof.expires_at)))
    }

    fn identity(&self, user: UserId, client_id: &str, roles: &[Role], expires_at: Option<Instant>) -> Identity {
        let mut bits = roles.iter().fold(0, |bits, role| bits | role.bit());
        if self.observers.contains(&user) {
            bits |= Role::Observer.bit();
        }
        Identity { user: user.as_arc(), client_id: client_id.into(), roles: Roles(bits), expires_at }
    }

    /// Who a device is while it is not connected, as far as that is known; `None` if its user is certain not to exist.
    pub fn identity_of(&self, user: &UserId, client_id: &str) -> Option<Identity> {
        if !self.may_exist(user) {
            return None;
        }
        let files = self.files();
        let roles = files.passwords.as_ref().and_then(|passwords| passwords.get(user)).map(|user| user.roles.clone());
        Some(self.identity(user.clone(), client_id, &roles.unwrap_or_default(), None))
    }

    async fn prove(&self, peer: &Peer, authentication: &Authentication) -> Result<Proof, ConnectRefusal> {
        if authentication.method != TOKEN_METHOD || self.files().tokens.is_none() {
            return Err(method_refused());
        }
        self.prove_token(address(peer), &authentication.data).await
    }

    async fn prove_token(&self, address: IpAddr, token: &[u8]) -> Result<Proof, ConnectRefusal> {
        let checked = match &self.files().tokens {
            Some(tokens) => tokens.check(token),
            None => Err("tokens are not taken".to_owned()),
        };
        match checked {
            Ok(proof) => Ok(proof),
            Err(reason) => {
                tracing::debug!(%address, %reason, "a token was refused");
                tokio::time::sleep(FAILURE_DELAY).await;
                Err(refuse(ConnectRefusalCode::BadUserNameOrPassword, &format!("the token was not taken: {reason}")))
            }
        }
    }

    async fn check_password(
        &self,
        address: IpAddr,
        name: &str,
        password: &[u8],
    ) -> Result<(UserId, Vec<Role>), ConnectRefusal> {
        let wrong = || refuse(ConnectRefusalCode::BadUserNameOrPassword, "user name or password are wrong");
        // A name that cannot be is looked at no less than one that could.
        let user = UserId::parse(name).ok();
        let guessed: Arc<str> = user.as_ref().map_or_else(|| Arc::from(""), UserId::as_arc);
        if let Some(wait) = self.guesses.lock().wait(address, &guessed, Instant::now()) {
            let sentence = format!("too many failed logins: try again in {} s", wait.as_secs() + 1);
            return Err(refuse(ConnectRefusalCode::ConnectionRateExceeded, &sentence));
        }
        let busy = || refuse(ConnectRefusalCode::ServerUnavailable, "too many logins at a time: try again");
        let _waiting = self.waiting.try_acquire().map_err(|_| busy())?;
        let _hashing = self.hashing.acquire().await.map_err(|_| busy())?;
        let files = self.files();
        let on_file = user.as_ref().and_then(|user| files.passwords.as_ref()?.get(user));
        let (checked, known) = (on_file.unwrap_or(&self.nobody).clone(), on_file.is_some());
        let password = password[..password.len().min(PASSWORD_BYTES_MAX + 1)].to_vec();
        let hashed = tokio::task::spawn_blocking(move || {
            let right = checked.is_password(&password) && password.len() <= PASSWORD_BYTES_MAX;
            (right && known).then_some(checked)
        });
        let found = hashed.await.map_err(|_| busy())?;
        drop((_hashing, _waiting));
        match (found, user) {
            (Some(found), Some(user)) => {
                self.guesses.lock().succeeded(address, &guessed);
                Ok((user, found.roles))
            }
            _ => {
                self.guesses.lock().failed(address, &guessed, Instant::now());
                tracing::info!(%address, "a login failed");
                tokio::time::sleep(FAILURE_DELAY).await;
                Err(wrong())
            }
        }
    }
}

/// Whoever shows a certificate is the user whose name it has.
fn by_certificate(name: &str, user_name: Option<&str>) -> Result<UserId, ConnectRefusal> {
    let refused = |sentence: &str| refuse(ConnectRefusalCode::BadUserNameOrPassword, sentence);
    if user_name.is_some_and(|user| !user.is_empty() && user != name) {
        return Err(refused("the certificate is another user's than the user name"));
    }
    UserId::parse(name).map_err(|error| refused(&format!("the certificate's common name: {error}")))
}

/// All whose address is not known count as one.
fn address(peer: &Peer) -> IpAddr {
    peer.address.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip())
}

fn refuse(code: ConnectRefusalCode, reason: &str) -> ConnectRefusal {
    ConnectRefusal { code, reason: reason.to_owned() }
}

fn method_refused() -> ConnectRefusal {
    let sentence = format!(
        "this authentication method is not supported: use user name and password, or {TOKEN_METHOD} where tokens are taken"
    );
    ConnectRefusal { code: ConnectRefusalCode::BadAuthenticationMethod, reason: sentence }
}

/// In development: whoever one says one is.
fn named(request: &ConnectRequest<'_>) -> Result<UserId, ConnectRefusal> {
    match request.user_name {
        Some(name) => UserId::parse(name)
            .map_err(|error| refuse(ConnectRefusalCode::BadUserNameOrPassword, &format!("invalid_user: {error}"))),
        None if request.client_id_assigned => Err(refuse(
            ConnectRefusalCode::BadUserNameOrPassword,
            "invalid_user: name yourself: send a user name or a client identifier",
        )),
        None => UserId::parse(request.client_id).map_err(|error| {
            let sentence = format!("invalid_user: without a user name the client identifier is the user: {error}");
            refuse(ConnectRefusalCode::ClientIdentifierNotValid, &sentence)
        }),
    }
}
