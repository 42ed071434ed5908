//! Who may come in: passwords on file, tokens, or in development everybody.
//!
//! Whoever is refused hears the same sentence after the same work, whether the name is known or not. Hashing a password is expensive by
//! design, so only so many are hashed at a time and only so many may wait; everything else goes on beside it. What files and fetched keys say is
//! replaced as a whole, and asked anew each time: nothing that follows from it is remembered.

pub mod acl;
pub mod authorities;
pub mod command;
mod desk;
mod guesses;
pub mod keys;
pub mod passwords;
pub mod tokens;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker::service::{
    Authentication, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Credential, Identity, Peer, Roles,
    ShownCertificate,
};
use broker::sparing::REFUSALS;
use chat_protocol::UserId;
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use self::acl::{Acl, AclFileError, Client, Wanted};
use self::authorities::Authorities;
use self::desk::{Desk, Guest, Room, Standing, Try, Turnstile};
use self::guesses::{Caller, Guesses};
use self::passwords::{PASSWORD_BYTES_MAX, PasswordFile, PasswordFileError, User};
use self::tokens::{Claims, KeyError, Keys, Proof, TokenError, Tokens};
use crate::settings::{AuthMode, AuthSettings};

/// The MQTT 5 authentication method that carries a token in CONNECT and renews it in AUTH.
pub const TOKEN_METHOD: &str = "JWT";
/// Where the admins read how the server is.
const SERVER_TOPICS: &str = "$SYS";
/// Passwords that wait to be hashed.
const PASSWORD_PLACES: usize = 64;
/// Tokens whose signature waits to be checked: that takes a hundredth of the time.
const TOKEN_PLACES: usize = 1_024;
/// Those who wait to try a user from a shared address, after too many failures from there.
const TRIES_WAITING_MAX: usize = 8;
/// A failed login is answered at a whole number of these after it came, so that not even the cost of a hash shows.
const FAILURE_DELAY: Duration = Duration::from_secs(1);

/// Whether the failures of an address count, whoever's they are: not if many share it, as behind a proxy.
pub type CountsAddress = Box<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// How many logins are worked on at a time: with few processors one, so that the other is left for everything else.
fn at_a_time() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if processors <= 2 { 1 } else { 2 }
}

/// Short for what somebody proved themselves with, to tell later whether it is still good.
fn fingerprint(parts: &[&[u8]]) -> Credential {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    Credential(digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

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

/// What the files said when they were read last, and the keys that were fetched last.
struct Rules {
    passwords: Option<PasswordFile>,
    /// `None`: tokens are not taken.
    tokens: Option<Tokens>,
    /// Keys are still to be fetched for the first time.
    awaits_keys: bool,
    acl: Option<Acl>,
    /// Whoever is not on file is checked against this, so that it takes as long.
    nobody: User,
}

/// What [`Rules`] are made of.
#[derive(Default)]
struct Sources {
    passwords: Option<PasswordFile>,
    keys_on_file: Option<Keys>,
    fetched_keys: Option<Keys>,
    acl: Option<Acl>,
}

/// Why a file of [`AuthSettings`] was refused.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("auth.password_file: {0}")]
    Passwords(#[from] PasswordFileError),
    #[error("auth.jwt_key_file: {0}")]
    Keys(#[from] KeyError),
    #[error("auth.acl_file: {0}")]
    Acl(#[from] AclFileError),
}

/// Who may come in.
pub struct Auth {
    mode: AuthMode,
    observers: Vec<UserId>,
    password_path: Option<PathBuf>,
    key_path: Option<PathBuf>,
    acl_path: Option<PathBuf>,
    fetches_keys: bool,
    /// `None`: certificates are not taken.
    authorities: Option<Arc<Authorities>>,
    claims: Claims,
    counts_address: CountsAddress,
    sources: Mutex<Sources>,
    rules: RwLock<Arc<Rules>>,
    keys_wanted: Notify,
    guesses: Mutex<Guesses>,
    hashing: Desk,
    checking: Desk,
    turnstile: Turnstile,
    /// Passwords that were hashed, right or wrong.
    hashed: Arc<AtomicU64>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Auth {
    /// # Errors
    /// A file cannot be read, or is not what it has to be.
    pub fn new(
        settings: &AuthSettings,
        authorities: Option<Arc<Authorities>>,
        counts_address: CountsAddress,
    ) -> Result<Self, AuthError> {
        let claims = Claims {
            audience: settings.jwt_audience.clone(),
            issuer: settings.jwt_issuer.clone(),
            roles: settings.jwt_roles_claim.clone(),
        };
        let room = |places| Room { at_a_time: at_a_time(), places };
        let nothing = Rules {
            passwords: None,
            tokens: None,
            awaits_keys: false,
            acl: None,
            nobody: PasswordFile::default().nobody(),
        };
        let auth = Self {
            mode: settings.mode,
            observers: settings.observers.clone(),
            password_path: settings.password_file.clone(),
            key_path: settings.jwt_key_file.clone(),
            acl_path: settings.acl_file.clone(),
            fetches_keys: settings.jwt_key_url.is_some(),
            authorities,
            claims,
            counts_address,
            sources: Mutex::default(),
            rules: RwLock::new(Arc::new(nothing)),
            keys_wanted: Notify::new(),
            guesses: Mutex::default(),
            hashing: Desk::new(room(PASSWORD_PLACES)),
            checking: Desk::new(room(TOKEN_PLACES)),
            turnstile: Turnstile::default(),
            hashed: Arc::default(),
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
            jwt_key_url: None,
            jwt_key_refresh: Duration::from_secs(3_600),
            jwt_audience: String::new(),
            jwt_issuer: String::new(),
            jwt_roles_claim: String::new(),
            observers: Vec::new(),
            acl_file: None,
        };
        Arc::new(Self::new(&settings, None, Box::new(|_| true)).expect("no file is read"))
    }

    /// Reads the files again. If one of them is wrong everything stays as it was.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it has to be.
    pub fn reload(&self) -> Result<(), AuthError> {
        // In development mode nobody is asked for a password; the file is read all the same, so that a mistake in it is told.
        let passwords = self.password_path.as_deref().map(PasswordFile::read).transpose()?;
        let keys_on_file = self.key_path.as_deref().map(Keys::read).transpose()?;
        let acl = self.acl_path.as_deref().map(Acl::read).transpose()?;
        self.change(|sources| {
            *sources = Sources { passwords, keys_on_file, acl, fetched_keys: sources.fetched_keys.take() }
        });
        Ok(())
    }

    /// Takes keys that were fetched; `false` if they were there before.
    pub fn take_keys(&self, keys: Keys) -> bool {
        let mut is_new = true;
        self.change(|sources| {
            is_new = sources.fetched_keys.as_ref().is_none_or(|before| !before.is_same(&keys));
            sources.fetched_keys = Some(keys);
        });
        is_new
    }

    /// Returns when a token has named a key that is not known.
    pub async fn keys_wanted(&self) {
        self.keys_wanted.notified().await;
    }

    fn change(&self, change: impl FnOnce(&mut Sources)) {
        // Held until the new rules are in place: two changes at a time do not undo each other.
        let mut sources = self.sources.lock();
        change(&mut sources);
        let takes_tokens = self.key_path.is_some() || self.fetches_keys;
        let keys = [&sources.keys_on_file, &sources.fetched_keys].into_iter().flatten().cloned();
        let rules = Rules {
            tokens: takes_tokens.then(|| Tokens::new(keys, self.claims.clone())),
            awaits_keys: self.fetches_keys && sources.fetched_keys.is_none(),
            acl: sources.acl.clone(),
            nobody: sources.passwords.as_ref().map_or_else(|| PasswordFile::default().nobody(), PasswordFile::nobody),
            passwords: sources.passwords.clone(),
        };
        *self.rules.write() = Arc::new(rules);
    }

    fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read())
    }

    /// `false` if it is certain that there is no such user: the password file has all of them, and not this one.
    pub fn may_exist(&self, user: &UserId) -> bool {
        let is_closed = self.mode == AuthMode::Required && self.authorities.is_none();
        let rules = self.rules.read();
        match (&rules.passwords, &rules.tokens) {
            (Some(passwords), None) if is_closed => passwords.has(user),
            _ => true,
        }
    }

    /// Whether everybody is let in.
    pub fn is_open(&self) -> bool {
        self.mode == AuthMode::Development
    }

    /// Whether a topic outside `chat/` may be published to.
    pub fn may_publish(&self, who: &Identity, topic: &str) -> bool {
        self.allows(who, topic, Wanted::Write)
    }

    /// Whether a message of a topic outside `chat/` may be received.
    pub fn may_receive(&self, who: &Identity, topic: &str) -> bool {
        if is_server_topic(topic) { self.may_watch(who) } else { self.allows(who, topic, Wanted::Read) }
    }

    /// Whether a filter outside `chat/` may be subscribed to. What it matches is asked again with every message.
    pub fn may_subscribe(&self, who: &Identity, filter: &str) -> bool {
        if is_server_topic(filter) {
            return self.may_watch(who);
        }
        match &self.rules.read().acl {
            Some(acl) => acl.could_read(client(who), filter),
            None => self.is_open(),
        }
    }

    fn allows(&self, who: &Identity, topic: &str, wanted: Wanted) -> bool {
        match &self.rules.read().acl {
            Some(acl) => acl.allows(client(who), topic, wanted),
            None => self.is_open(),
        }
    }

    fn may_watch(&self, who: &Identity) -> bool {
        self.is_open() || Role::Admin.is_in(who.roles)
    }

    /// Who somebody is now that files were read again or keys fetched. `None` if nobody any more: the password is another one or gone, or the key
    /// is that signed the token, or an authority whose certificates were taken.
    pub fn recheck(&self, who: &Identity) -> Option<Identity> {
        if self.is_open() {
            return Some(who.clone());
        }
        let user = UserId::parse(&who.user).ok()?;
        if who.credential == Credential::default() {
            return self.may_exist(&user).then(|| who.clone());
        }
        let rules = self.rules();
        let on_file = rules.passwords.as_ref().and_then(|passwords| passwords.get(&user));
        if let Some(found) = on_file.filter(|found| found.credential() == who.credential) {
            return Some(Identity { roles: self.roles(&user, &found.roles), ..who.clone() });
        }
        let signed = rules.tokens.as_ref().is_some_and(|tokens| tokens.has_key(who.credential));
        let shown = self.authorities.as_ref().is_some_and(|authorities| authorities.takes(who.credential));
        (signed || shown).then(|| who.clone())
    }

    /// Who asks to come in, or why not.
    pub async fn connect(&self, request: &ConnectRequest<'_>) -> Result<Identity, ConnectRefusal> {
        let client_id = request.client_id;
        let without_proof = |user: UserId| self.identity(user, client_id, &[], Credential::default(), None);
        if self.mode == AuthMode::Development {
            if request.authentication.is_some() {
                return Err(method_refused());
            }
            return named(request).map(without_proof);
        }
        if let Some(authentication) = request.authentication {
            let name = request.user_name.filter(|name| !name.is_empty());
            let proof = self.prove(request.peer, name, authentication).await?;
            is_of(&proof, name)?;
            return Ok(self.proven(proof, client_id));
        }
        if let (Some(certificate), None) = (&request.peer.certificate, request.password) {
            let user = self.by_certificate(certificate, request.user_name)?;
            let ShownCertificate { credential, expires_at, .. } = certificate;
            return Ok(self.identity(user, client_id, &[], *credential, Some(*expires_at)));
        }
        let Some(password) = request.password else {
            return Err(refuse(
                ConnectRefusalCode::BadUserNameOrPassword,
                "user name and password, or a token as password, are needed",
            ));
        };
        // Empty: whoever the token is about.
        let name = request.user_name.unwrap_or_default();
        if self.rules().tokens.is_some() && Tokens::is_token(password) {
            let name = (!name.is_empty()).then_some(name);
            let proof = self.prove_token(request.peer, name, password).await?;
            is_of(&proof, name)?;
            return Ok(self.proven(proof, client_id));
        }
        let (user, found) = self.check_password(request.peer, name, password).await?;
        let credential = found.credential();
        Ok(self.identity(user, client_id, &found.roles, credential, None))
    }

    /// The same user proves again who they are.
    pub async fn authenticate_again(
        &self,
        peer: &Peer,
        identity: &Identity,
        authentication: &Authentication,
    ) -> Result<Identity, ConnectRefusal> {
        let proof = self.prove(peer, Some(&identity.user), authentication).await?;
        if *identity.user != *proof.user.as_str() {
            return Err(refuse(ConnectRefusalCode::NotAuthorized, "the token is another user's"));
        }
        Ok(self.proven(proof, &identity.client_id))
    }

    /// Whoever shows a certificate is the user whose name it has.
    fn by_certificate(
        &self,
        ShownCertificate { name, expires_at, credential }: &ShownCertificate,
        user_name: Option<&str>,
    ) -> Result<UserId, ConnectRefusal> {
        let refused = |sentence: &str| refuse(ConnectRefusalCode::BadUserNameOrPassword, sentence);
        if user_name.is_some_and(|user| !user.is_empty() && user != &**name) {
            return Err(refused("the certificate is another user's than the user name"));
        }
        // It was good in the handshake, which may have been long ago.
        if *expires_at <= Instant::now() {
            return Err(refused("the certificate has expired"));
        }
        if !self.authorities.as_ref().is_some_and(|authorities| authorities.takes(*credential)) {
            return Err(refused(
                "the certificate is not taken any more: those who vouch for certificates have changed",
            ));
        }
        UserId::parse(name).map_err(|error| refused(&format!("the certificate's common name: {error}")))
    }

    fn proven(&self, proof: Proof, client_id: &str) -> Identity {
        self.identity(proof.user, client_id, &proof.roles, proof.credential, Some(proof.expires_at))
    }

    /// Who a device is while it is not connected, as far as that is known; `None` if its user is certain not to exist.
    pub fn identity_of(&self, user: &UserId, client_id: &str) -> Option<Identity> {
        if !self.may_exist(user) {
            return None;
        }
        let rules = self.rules();
        let on_file = rules.passwords.as_ref().and_then(|passwords| passwords.get(user));
        let (credential, roles) = on_file.map(|found| (found.credential(), found.roles.clone())).unwrap_or_default();
        Some(self.identity(user.clone(), client_id, &roles, credential, None))
    }

    fn identity(
        &self,
        user: UserId,
        client_id: &str,
        roles: &[Role],
        credential: Credential,
        expires_at: Option<Instant>,
    ) -> Identity {
        let roles = self.roles(&user, roles);
        Identity { user: user.as_arc(), client_id: client_id.into(), roles, credential, expires_at }
    }

    fn roles(&self, user: &UserId, roles: &[Role]) -> Roles {
        let bits = roles.iter().fold(0, |bits, role| bits | role.bit());
        Roles(if self.observers.contains(user) { bits | Role::Observer.bit() } else { bits })
    }

    async fn prove(
        &self,
        peer: &Peer,
        claimed: Option<&str>,
        authentication: &Authentication,
    ) -> Result<Proof, ConnectRefusal> {
        if authentication.method != TOKEN_METHOD || self.rules().tokens.is_none() {
            return Err(method_refused());
        }
        self.prove_token(peer, claimed, &authentication.data).await
    }

    /// `user`: `None` if there is no name that a user could have.
    fn caller(&self, peer: &Peer, user: Option<&UserId>) -> Caller {
        let address = address(peer);
        let user = user.map_or_else(|| Arc::from(""), UserId::as_arc);
        Caller { address, user, counts_address: (self.counts_address)(address) }
    }

    /// Nothing is looked at for those who have guessed too often. Where many share an address it may be somebody else who has: there they take
    /// turns, until what is returned is dropped.
    async fn may_try(&self, caller: &Caller) -> Result<Option<Try>, ConnectRefusal> {
        let Some(wait) = self.guesses.lock().wait(caller, Instant::now()) else { return Ok(None) };
        let refused = |sentence: &str| refuse(ConnectRefusalCode::ConnectionRateExceeded, sentence);
        if caller.counts_address {
            return Err(refused(&format!("too many failed logins: try again in {} s", wait.as_secs() + 1)));
        }
        let turn = self.turnstile.turn(caller.guest(), TRIES_WAITING_MAX).await;
        turn.map(Some)
            .ok_or_else(|| refused("too many failed logins of this user from there: try again in some seconds"))
    }

    /// As whom they wait.
    fn guest(&self, caller: &Caller) -> Guest {
        let is_suspect = self.guesses.lock().is_suspect(caller, Instant::now());
        let standing = if is_suspect { Standing::Suspect } else { Standing::Good };
        Guest { who: caller.guest(), shared: caller.shared(), standing }
    }

    async fn prove_token(&self, peer: &Peer, claimed: Option<&str>, token: &[u8]) -> Result<Proof, ConnectRefusal> {
        let user = match claimed {
            Some(name) => UserId::parse(name).ok(),
            None => Tokens::claimed_user(token),
        };
        let caller = self.caller(peer, user.as_ref());
        let _try = self.may_try(&caller).await?;
        // From here: whoever had to wait for their turn does not go faster for it.
        let began = Instant::now();
        let mut checked = self.check_token(&caller, token).await?;
        if checked.as_ref().is_err_and(TokenError::names_unknown_key) && self.fetches_keys {
            // The key may be new. Perhaps it is there when the answer is due.
            self.keys_wanted.notify_one();
            answer_late(began).await;
            checked = self.check_token(&caller, token).await?;
        }
        let error = match checked {
            Ok(proof) => {
                self.guesses.lock().succeeded(&caller);
                return Ok(proof);
            }
            Err(error) => error,
        };
        if self.rules().awaits_keys && !matches!(error, TokenError::NotValid(_)) {
            let sentence = "the keys are not there yet that tokens are checked with: try again";
            return Err(refuse(ConnectRefusalCode::ServerUnavailable, sentence));
        }
        if matches!(error, TokenError::Forged { .. }) {
            self.guesses.lock().failed(&caller, Instant::now());
        }
        if REFUSALS.may_say() {
            tracing::info!(address = %caller.address, reason = ?error.to_string(), "a token was refused");
        }
        answer_late(began).await;
        Err(refuse(ConnectRefusalCode::BadUserNameOrPassword, &format!("the token was not taken: {error}")))
    }

    async fn check_token(&self, caller: &Caller, token: &[u8]) -> Result<Result<Proof, TokenError>, ConnectRefusal> {
        let turn = self.checking.turn(&self.guest(caller)).await.ok_or_else(busy)?;
        let (rules, token) = (self.rules(), token.to_vec());
        let checked = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            match &rules.tokens {
                Some(tokens) => tokens.check(&token),
                None => Err(TokenError::NotValid("tokens are not taken".to_owned())),
            }
        });
        checked.await.map_err(|_| busy())
    }

    async fn check_password(&self, peer: &Peer, name: &str, password: &[u8]) -> Result<(UserId, User), ConnectRefusal> {
        // A name that cannot be is looked at no less than one that could.
        let user = UserId::parse(name).ok();
        let caller = self.caller(peer, user.as_ref());
        let _try = self.may_try(&caller).await?;
        let began = Instant::now();
        let turn = self.hashing.turn(&self.guest(&caller)).await.ok_or_else(busy)?;
        let rules = self.rules();
        let on_file = user.as_ref().and_then(|user| rules.passwords.as_ref()?.get(user));
        let (checked, known) = (on_file.unwrap_or(&rules.nobody).clone(), on_file.is_some());
        let password = password[..password.len().min(PASSWORD_BYTES_MAX + 1)].to_vec();
        let count = Arc::clone(&self.hashed);
        let hashed = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            count.fetch_add(1, Ordering::Relaxed);
            let right = checked.is_password(&password) && password.len() <= PASSWORD_BYTES_MAX;
            (right && known).then_some(checked)
        });
        let found = hashed.await.map_err(|_| busy())?;
        if let (Some(found), Some(user)) = (found, user) {
            self.guesses.lock().succeeded(&caller);
            return Ok((user, found));
        }
        self.guesses.lock().failed(&caller, Instant::now());
        if REFUSALS.may_say() {
            tracing::info!(address = %caller.address, "a login failed");
        }
        answer_late(began).await;
        Err(refuse(ConnectRefusalCode::BadUserNameOrPassword, "user name or password are wrong"))
    }
}

/// A token may come with the name of its user, or with none.
fn is_of(proof: &Proof, name: Option<&str>) -> Result<(), ConnectRefusal> {
    if name.is_some_and(|name| name != proof.user.as_str()) {
        let sentence = "the token is another user's than the user name";
        return Err(refuse(ConnectRefusalCode::BadUserNameOrPassword, sentence));
    }
    Ok(())
}

/// Waits until a failure that began then may be answered.
async fn answer_late(began: Instant) {
    let periods = u32::try_from(began.elapsed().as_millis() / FAILURE_DELAY.as_millis()).unwrap_or(u32::MAX);
    tokio::time::sleep_until((began + FAILURE_DELAY * periods.saturating_add(1)).into()).await;
}

fn client(who: &Identity) -> Client<'_> {
    Client { user: &who.user, client_id: &who.client_id }
}

/// Whether a topic or filter is the server's own.
fn is_server_topic(topic: &str) -> bool {
    topic.split('/').next() == Some(SERVER_TOPICS)
}

fn busy() -> ConnectRefusal {
    refuse(ConnectRefusalCode::ServerUnavailable, "too many logins at a time: try again")
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
        None if request.client_id_assigned => Ok(guest(request.client_id)),
        None => Ok(UserId::parse(request.client_id).unwrap_or_else(|_| guest(request.client_id))),
    }
}

/// In development: a client that names no user, and whose identifier is none (as of a sensor), has a name of its own all the same, always the
/// same one.
fn guest(client_id: &str) -> UserId {
    let digest = Sha256::digest(client_id.as_bytes());
    let digits: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    UserId::parse(&format!("guest-{digits}")).expect("letters, digits and a hyphen are a user name")
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn settings() -> AuthSettings {
        AuthSettings {
            mode: AuthMode::Required,
            password_file: None,
            jwt_key_file: None,
            jwt_key_url: None,
            jwt_key_refresh: Duration::from_secs(3_600),
            jwt_audience: String::new(),
            jwt_issuer: String::new(),
            jwt_roles_claim: "roles".to_owned(),
            observers: Vec::new(),
            acl_file: None,
        }
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, text: &str) -> Option<PathBuf> {
            let path = self.0.path().join(name);
            std::fs::write(&path, text).unwrap();
            Some(path)
        }
    }

    fn auth(settings: &AuthSettings) -> Auth {
        Auth::new(settings, None, Box::new(|_| true)).unwrap()
    }

    fn on_file(users: &[(&str, Vec<Role>)]) -> String {
        let mut file = PasswordFile::default();
        for (name, roles) in users {
            let name = UserId::parse(name).unwrap();
            file.put(name.clone(), User::with_password(name.as_str().as_bytes(), roles.clone()));
        }
        let folder = Folder::new();
        let path = folder.write("users", "").unwrap();
        file.write(&path).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    fn from(address: &str) -> Peer {
        Peer { address: Some(SocketAddr::new(address.parse().unwrap(), 1)), certificate: None }
    }

    async fn log_in(auth: &Auth, peer: &Peer, name: &str, password: &[u8]) -> Result<Identity, ConnectRefusalCode> {
        let request = ConnectRequest {
            peer,
            client_id: "phone",
            client_id_assigned: false,
            user_name: Some(name),
            password: Some(password),
            authentication: None,
        };
        auth.connect(&request).await.map_err(|refusal| refusal.code)
    }

    /// The work is the same for users who are there, who are not, and who cannot be.
    #[tokio::test]
    async fn every_login_costs_one_hash() {
        let folder = Folder::new();
        let users = folder.write("users", &on_file(&[("alice", Vec::new())]));
        let keys = folder.write("key", "0123456789abcdef0123456789abcdef");
        let both = AuthSettings { password_file: users.clone(), jwt_key_file: keys.clone(), ..settings() };
        let passwords = AuthSettings { password_file: users, ..settings() };
        let tokens = AuthSettings { jwt_key_file: keys, ..settings() };
        for settings in [passwords, both, tokens] {
            let auth = auth(&settings);
            let home = from("192.0.2.1");
            let long = [b'x'; 5_000];
            let names = [
                ("alice", &b"wrong"[..]),
                ("nobody", b"wrong"),
                ("Not A Name", b"wrong"),
                ("", b"wrong"),
                ("alice", &long),
            ];
            for refused in join(names.into_iter().map(|(name, password)| log_in(&auth, &home, name, password))).await {
                assert_eq!(refused.unwrap_err(), ConnectRefusalCode::BadUserNameOrPassword);
            }
            assert_eq!(auth.hashed.load(Ordering::Relaxed), u64::try_from(names.len()).unwrap());
        }
    }

    #[tokio::test]
    async fn tokens_are_guessed_no_faster_than_passwords() {
        let folder = Folder::new();
        let settings =
            AuthSettings { jwt_key_file: folder.write("key", "0123456789abcdef0123456789abcdef"), ..settings() };
        let auth = auth(&settings);
        let home = from("192.0.2.1");
        let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
        let body = serde_json::json!({"sub": "alice", "exp": 4_000_000_000_u64});
        let signed = |secret: &str| {
            let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
            jsonwebtoken::encode(&header, &body, &key).unwrap()
        };
        let (right, forged) =
            (signed("0123456789abcdef0123456789abcdef"), signed("another secret of 32 bytes or more"));
        let guesses = (0..10).map(|_| log_in(&auth, &home, "", forged.as_bytes()));
        for guess in join(guesses).await {
            assert_eq!(guess.unwrap_err(), ConnectRefusalCode::BadUserNameOrPassword);
        }
        // By the name that the token has, or that it comes with.
        for name in ["", "alice"] {
            let refused = log_in(&auth, &home, name, right.as_bytes()).await;
            assert_eq!(refused.unwrap_err(), ConnectRefusalCode::ConnectionRateExceeded);
        }
        let elsewhere = log_in(&auth, &from("192.0.2.2"), "", right.as_bytes()).await.unwrap();
        assert_eq!(&*elsewhere.user, "alice");
    }

    #[tokio::test]
    async fn where_many_share_an_address_guesses_slow_down_and_lock_nobody_out() {
        let folder = Folder::new();
        let users = folder.write("users", &on_file(&[("alice", Vec::new())]));
        let auth = Auth::new(&AuthSettings { password_file: users, ..settings() }, None, Box::new(|_| false)).unwrap();
        let proxy = from("192.0.2.1");
        for guess in join((0..10).map(|_| log_in(&auth, &proxy, "alice", b"wrong"))).await {
            assert_eq!(guess.unwrap_err(), ConnectRefusalCode::BadUserNameOrPassword);
        }
        // One after the other from here on, each as long as a failure takes; and no more wait than may.
        let began = Instant::now();
        let guesses = join((0..TRIES_WAITING_MAX + 3).map(|_| log_in(&auth, &proxy, "alice", b"wrong")));
        let refused = guesses.await.into_iter().map(Result::unwrap_err);
        let turned_away = refused.filter(|code| *code == ConnectRefusalCode::ConnectionRateExceeded).count();
        assert_eq!(turned_away, 3);
        let least = FAILURE_DELAY * u32::try_from(TRIES_WAITING_MAX).unwrap();
        assert!(began.elapsed() >= least, "{:?}", began.elapsed());
        log_in(&auth, &proxy, "alice", b"alice").await.unwrap();
    }

    fn certified(name: &str, left: Duration, credential: Credential) -> Peer {
        let expires_at = Instant::now() + left;
        Peer { certificate: Some(ShownCertificate { name: name.into(), expires_at, credential }), ..from("192.0.2.1") }
    }

    #[tokio::test]
    async fn a_certificate_opens_as_long_as_it_lasts_and_is_taken() {
        let authorities = Arc::new(Authorities::default());
        let auth = Auth::new(&settings(), Some(Arc::clone(&authorities)), Box::new(|_| true)).unwrap();
        let show = async |peer: &Peer| {
            let request = ConnectRequest {
                peer,
                client_id: "phone",
                client_id_assigned: false,
                user_name: None,
                password: None,
                authentication: None,
            };
            auth.connect(&request).await
        };
        let (ours, hour) = (authorities.set([b"ours".as_slice()]), Duration::from_secs(3_600));
        let peer = certified("alice", hour, ours);
        let alice = show(&peer).await.unwrap();
        assert_eq!(alice.expires_at, peer.certificate.as_ref().map(|certificate| certificate.expires_at));
        assert_eq!(auth.recheck(&alice).as_ref(), Some(&alice));
        assert!(show(&certified("alice", Duration::ZERO, ours)).await.unwrap_err().reason.contains("expired"));
        authorities.set([b"ours".as_slice(), b"another's"]);
        assert_eq!(auth.recheck(&alice).as_ref(), Some(&alice), "whoever is added takes nothing from others");
        authorities.set([b"another's".as_slice()]);
        assert_eq!(auth.recheck(&alice), None);
        assert!(show(&peer).await.unwrap_err().reason.contains("not taken any more"));
    }

    #[tokio::test]
    async fn the_method_heeds_the_user_name() {
        let folder = Folder::new();
        let keys = folder.write("key", "0123456789abcdef0123456789abcdef");
        let auth = auth(&AuthSettings { jwt_key_file: keys, ..settings() });
        let key = jsonwebtoken::EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
        let body = serde_json::json!({"sub": "alice", "exp": 4_000_000_000_u64});
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &body, &key).unwrap();
        let authentication = Authentication { method: TOKEN_METHOD.to_owned(), data: token.into_bytes() };
        let home = from("192.0.2.1");
        for (user_name, is_in) in [(None, true), (Some(""), true), (Some("alice"), true), (Some("bob"), false)] {
            let request = ConnectRequest {
                peer: &home,
                client_id: "phone",
                client_id_assigned: false,
                user_name,
                password: None,
                authentication: Some(&authentication),
            };
            let outcome = auth.connect(&request).await;
            assert_eq!(outcome.is_ok(), is_in, "{user_name:?}: {outcome:?}");
        }
    }

    /// All of them at a time.
    async fn join<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
        let mut futures: Vec<_> = futures.map(Box::pin).collect();
        let mut done = Vec::new();
        std::future::poll_fn(|context| {
            futures.retain_mut(|future| match future.as_mut().poll(context) {
                std::task::Poll::Ready(value) => {
                    done.push(value);
                    false
                }
                std::task::Poll::Pending => true,
            });
            if futures.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        done
    }

    #[tokio::test]
    async fn who_somebody_is_changes_with_the_files() {
        let folder = Folder::new();
        let before = on_file(&[("alice", Vec::new()), ("bob", vec![Role::Observer]), ("carol", Vec::new())]);
        let users = folder.write("users", &before);
        let keys = folder.write("key", "0123456789abcdef0123456789abcdef");
        let auth = auth(&AuthSettings { password_file: users, jwt_key_file: keys, ..settings() });
        let home = from("192.0.2.1");
        let alice = log_in(&auth, &home, "alice", b"alice").await.unwrap();
        let bob = log_in(&auth, &home, "bob", b"bob").await.unwrap();
        let carol = log_in(&auth, &home, "carol", b"carol").await.unwrap();
        let body = serde_json::json!({"sub": "dave", "exp": 4_000_000_000_u64, "roles": "admin"});
        let key = jsonwebtoken::EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &body, &key).unwrap();
        let dave = log_in(&auth, &home, "", token.as_bytes()).await.unwrap();
        assert!(Role::Admin.is_in(dave.roles));
        for who in [&alice, &bob, &carol, &dave] {
            assert_eq!(auth.recheck(who).as_ref(), Some(who), "nothing has changed");
        }

        // Alice gets a role, bob loses his, carol another password.
        let line =
            |name: &str| before.lines().find(|line| line.starts_with(name)).unwrap().trim_end_matches(":observer");
        let carols = on_file(&[("carol", Vec::new())]);
        folder.write("users", &format!("{}:admin\n{}\n{carols}", line("alice"), line("bob")));
        auth.reload().unwrap();
        assert!(Role::Admin.is_in(auth.recheck(&alice).unwrap().roles));
        assert_eq!(auth.recheck(&bob).unwrap().roles, Roles(0));
        assert_eq!(auth.recheck(&carol), None, "she has to log in again");
        assert_eq!(auth.recheck(&dave), Some(dave.clone()));

        // A mistake changes nothing.
        folder.write("users", "alice:secret\n");
        folder.write("key", "another_secret_of_32_bytes_or_more");
        auth.reload().unwrap_err();
        assert!(auth.recheck(&bob).is_some() && auth.recheck(&dave).is_some());
        folder.write("users", "");
        auth.reload().unwrap();
        assert!([&alice, &bob, &carol, &dave].into_iter().all(|who| auth.recheck(who).is_none()));
    }

    #[tokio::test]
    async fn keys_that_are_still_to_come_are_no_guesses() {
        let url = Some("http://127.0.0.1:1/keys".parse().unwrap());
        let auth = auth(&AuthSettings { jwt_key_url: url, ..settings() });
        let set = include_str!("../../fixtures/ed25519-public.jwks");
        let key = jsonwebtoken::EncodingKey::from_ed_pem(include_bytes!("../../fixtures/ed25519-private.pem")).unwrap();
        let body = serde_json::json!({"sub": "alice", "exp": 4_000_000_000_u64});
        let header = jsonwebtoken::Header {
            kid: Some("2026".to_owned()),
            ..jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA)
        };
        let token = jsonwebtoken::encode(&header, &body, &key).unwrap();
        let home = from("192.0.2.1");
        for refused in join((0..12).map(|_| log_in(&auth, &home, "", token.as_bytes()))).await {
            assert_eq!(refused.unwrap_err(), ConnectRefusalCode::ServerUnavailable);
        }
        auth.keys_wanted().await;
        assert!(auth.take_keys(Keys::parse_public_set(set).unwrap()));
        assert!(!auth.take_keys(Keys::parse_public_set(set).unwrap()), "they are the same");
        let alice = log_in(&auth, &home, "", token.as_bytes()).await.unwrap();
        // Files that are read again leave what was fetched as it is.
        auth.reload().unwrap();
        assert_eq!(auth.recheck(&alice), Some(alice));
    }
}
