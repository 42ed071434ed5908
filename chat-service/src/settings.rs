//! The settings of `chatd`: where they come from, what they may be, and which source is to blame when one is wrong.
//!
//! The built-in defaults are the file `config/chatd.toml` itself, so file and code cannot drift apart. A [`Settings`] that exists has
//! been judged: nobody checks a value again. A refusal names the source (file, environment variable or flag), the key and the reason.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use broker::admission::Network;
use broker::websocket::AllowedOrigin;
use chat_protocol::UserId;
use config::{Config, ConfigError, Environment, File, FileFormat, Map, Source, Value, ValueKind};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tracing_subscriber::EnvFilter;

use crate::acme::{DirectoryUrl, DomainName};
use crate::auth::keys::KeyUrl;
use crate::cli::Flags;
use crate::webhooks::{SECRET_BYTES_MIN, Secret, WebhookUrl};

/// The file whose values are the defaults.
const DEFAULTS: &str = include_str!("../../config/chatd.toml");
/// Read from here if nobody names another file and this one exists.
const DEFAULT_FILE: &str = "config/chatd.toml";
/// Environment variables begin with this, and two underscores.
const ENVIRONMENT_PREFIX: &str = "CHATD";
/// What a PUBLISH of a message needs besides its text: topic, id, properties.
const PACKET_BYTES_BESIDES_TEXT: usize = 1024;

const SECONDS_PER_DAY: u64 = 86_400;

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub mqtt: MqttSettings,
    pub http: HttpSettings,
    pub tls: TlsSettings,
    pub acme: AcmeSettings,
    pub storage: StorageSettings,
    pub auth: AuthSettings,
    pub webhooks: WebhookSettings,
    pub limits: Limits,
    pub log: LogSettings,
}

/// The MQTT listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MqttSettings {
    #[serde(deserialize_with = "listen_address")]
    pub listen: SocketAddr,
    #[serde(deserialize_with = "optional_address", serialize_with = "as_optional")]
    pub tls_listen: Option<SocketAddr>,
}

/// The HTTP listener, which also carries MQTT over WebSocket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    #[serde(deserialize_with = "listen_address")]
    pub listen: SocketAddr,
    #[serde(deserialize_with = "optional_address", serialize_with = "as_optional")]
    pub tls_listen: Option<SocketAddr>,
    #[serde(deserialize_with = "list", serialize_with = "as_list")]
    pub origins: Vec<AllowedOrigin>,
    #[serde(deserialize_with = "text")]
    pub metrics: MetricsFor,
}

/// Who may read `/metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsFor {
    /// Whoever comes from this machine.
    Loopback,
    /// Whoever reaches the port.
    Everybody,
    /// Nobody.
    Off,
}

/// How the server proves who it is, and clients may.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub certificate: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub key: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub client_ca: Option<PathBuf>,
}

/// Where the server gets its certificate from by itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AcmeSettings {
    #[serde(deserialize_with = "list", serialize_with = "as_list")]
    pub domains: Vec<DomainName>,
    #[serde(deserialize_with = "any_text")]
    pub contact: String,
    #[serde(deserialize_with = "text")]
    pub directory: DirectoryUrl,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub directory_ca: Option<PathBuf>,
    #[serde(deserialize_with = "yes_or_no")]
    pub accept_terms: bool,
}

impl AcmeSettings {
    /// Whether there is anything to get a certificate for.
    pub fn is_on(&self) -> bool {
        !self.domains.is_empty()
    }
}

/// Where messages and sessions lie.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSettings {
    /// A folder; relative to the working directory.
    #[serde(deserialize_with = "folder")]
    pub path: PathBuf,
    /// Zero: for ever.
    #[serde(rename = "retention_days")]
    #[serde(deserialize_with = "days_within::<_, 0, 36_500>", serialize_with = "as_days")]
    pub retention: Duration,
    #[serde(rename = "erase_interval_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 100, 86_400_000>", serialize_with = "as_milliseconds")]
    pub erase_interval: Duration,
}

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuthSettings {
    #[serde(deserialize_with = "text")]
    pub mode: AuthMode,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub password_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub jwt_key_file: Option<PathBuf>,
    /// `None`: keys come from the file alone.
    #[serde(deserialize_with = "optional", serialize_with = "as_optional")]
    pub jwt_key_url: Option<KeyUrl>,
    #[serde(rename = "jwt_key_refresh_s")]
    #[serde(deserialize_with = "seconds_within::<_, 30, 604_800>", serialize_with = "as_seconds")]
    pub jwt_key_refresh: Duration,
    #[serde(deserialize_with = "any_text")]
    pub jwt_audience: String,
    #[serde(deserialize_with = "any_text")]
    pub jwt_issuer: String,
    #[serde(deserialize_with = "any_text")]
    pub jwt_roles_claim: String,
    #[serde(deserialize_with = "list", serialize_with = "as_list")]
    pub observers: Vec<UserId>,
    #[serde(deserialize_with = "optional_path", serialize_with = "as_optional_path")]
    pub acl_file: Option<PathBuf>,
}

/// How a client proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// It does not: loopback only, any name, passwords ignored.
    Development,
    /// With a password or a token.
    Required,
}

/// What is posted where.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookSettings {
    /// `None`: nowhere.
    #[serde(deserialize_with = "optional", serialize_with = "as_optional")]
    pub url: Option<WebhookUrl>,
    #[serde(deserialize_with = "text", serialize_with = "as_hidden")]
    pub secret: Secret,
    #[serde(deserialize_with = "list", serialize_with = "as_list")]
    pub events: Vec<WebhookEvent>,
    #[serde(rename = "timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 1, 600_000>", serialize_with = "as_milliseconds")]
    pub timeout: Duration,
}

/// What can be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookEvent {
    MessageStored,
    MessageWaiting,
    Presence,
}

impl fmt::Display for WebhookEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MessageStored => "message.stored",
            Self::MessageWaiting => "message.waiting",
            Self::Presence => "presence",
        })
    }
}

/// Capacities and deadlines; what each means is said in `config/chatd.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    #[serde(deserialize_with = "within::<_, _, 1, 1_048_576>")]
    pub message_bytes: usize,
    /// At most what MQTT's remaining length can say.
    #[serde(deserialize_with = "within::<_, _, 1_024, 268_435_455>")]
    pub packet_bytes: u32,
    #[serde(deserialize_with = "within::<_, _, 1, 10_000_000>")]
    pub connections: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 10_000_000>")]
    pub connections_per_address: usize,
    #[serde(deserialize_with = "list", serialize_with = "as_list")]
    pub uncounted_addresses: Vec<Network>,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 10_000_000>")]
    pub connections_per_user: usize,
    /// A CONNECT with the longest client identifier, user name and a token has room in the least.
    #[serde(deserialize_with = "within::<_, _, 1_024, 268_435_455>")]
    pub connect_bytes: u32,
    #[serde(rename = "connect_timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 1, 600_000>", serialize_with = "as_milliseconds")]
    pub connect_timeout: Duration,
    #[serde(rename = "tls_timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 1, 600_000>", serialize_with = "as_milliseconds")]
    pub tls_timeout: Duration,
    #[serde(rename = "websocket_timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 1, 600_000>", serialize_with = "as_milliseconds")]
    pub websocket_timeout: Duration,
    /// Zero: never.
    #[serde(rename = "idle_timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 0, 604_800_000>", serialize_with = "as_milliseconds")]
    pub idle_timeout: Duration,
    #[serde(rename = "shutdown_timeout_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 0, 600_000>", serialize_with = "as_milliseconds")]
    pub shutdown_timeout: Duration,
    #[serde(rename = "presence_grace_ms")]
    #[serde(deserialize_with = "milliseconds_within::<_, 0, 600_000>", serialize_with = "as_milliseconds")]
    pub presence_grace: Duration,
    #[serde(deserialize_with = "within::<_, _, 1, 65_535>")]
    pub receive_maximum: u16,
    #[serde(deserialize_with = "within::<_, _, 1, 65_535>")]
    pub window: u16,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 65_535>")]
    pub user_properties: usize,
    /// The longest of `chat/{me}/out/{peer}/{id}` has room in the least. Zero: as many as MQTT can say.
    #[serde(deserialize_with = "zero_or_within::<_, _, 256, 65_535>")]
    pub topic_bytes: usize,
    /// A topic has at most 65,535 bytes; `chat/{me}/out/{peer}/{id}` needs 5 levels.
    #[serde(deserialize_with = "within::<_, _, 5, 65_536>")]
    pub topic_levels: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub subscriptions_per_session: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub filters_per_user: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub subscriptions_per_user: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 10_000_000>")]
    pub sessions_per_user: usize,
    /// `u32::MAX`: for ever, as in MQTT 5.
    #[serde(deserialize_with = "within::<_, _, 0, 4_294_967_295>")]
    pub session_expiry_max_s: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 65_535>")]
    pub keep_alive_max_s: u16,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_000_000_000>")]
    pub publishes_per_s: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 4_294_967_295>")]
    pub publish_bytes_per_s: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_000_000_000>")]
    pub user_publishes_per_s: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 4_294_967_295>")]
    pub user_publish_bytes_per_s: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_000_000>")]
    pub new_conversations_per_hour: u32,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_125_899_906_842_624>")]
    pub user_bytes: u64,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_125_899_906_842_624>")]
    pub conversation_bytes: u64,
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub retained_messages: usize,
    #[serde(deserialize_with = "within::<_, _, 0, 1_099_511_627_776>")]
    pub retained_bytes: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub user_retained_messages: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_099_511_627_776>")]
    pub user_retained_bytes: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub queue_messages: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 1_073_741_824>")]
    pub queue_bytes: usize,
    /// Zero: no limit.
    #[serde(deserialize_with = "within::<_, _, 0, 1_099_511_627_776>")]
    pub user_queues_bytes: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 1_099_511_627_776>")]
    pub queues_bytes: usize,
}

/// What chatd says about itself on stderr.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    #[serde(deserialize_with = "text")]
    pub level: LogLevel,
    #[serde(deserialize_with = "text")]
    pub format: LogFormat,
}

/// Directives that `EnvFilter` understands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct LogLevel(String);

impl LogLevel {
    /// The directives as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; coloured if stderr is a terminal.
    Auto,
    /// For people, coloured.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The defaults that are built in.
    Defaults,
    File(PathBuf),
    /// The variable's name.
    Environment(String),
    /// The flag as it is written.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Defaults => f.write_str("built-in defaults"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// Why settings were refused. Each is a mistake of whoever wrote them, so the exit code is that of wrong usage.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file cannot be read.
    #[error("{}: cannot be read: {cause}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The settings file is not TOML; the cause names line and column.
    #[error("{}: not valid TOML: {cause}", path.display())]
    Syntax { path: PathBuf, cause: String },
    /// The environment cannot be read.
    #[error("environment: {cause}")]
    Environment { cause: String },
    /// A key that does not exist.
    #[error("{origin}: unknown key `{key}`: {reason}")]
    UnknownKey { origin: Origin, key: String, reason: String },
    /// A value that cannot be.
    #[error("{origin}: bad value for `{key}`: {reason}")]
    BadValue { origin: Origin, key: String, reason: String },
}

impl Settings {
    /// Defaults, then the file, then the process's environment, then the flags.
    ///
    /// # Errors
    /// [`SettingsError`] for the first thing found wrong.
    pub fn load(flags: &Flags) -> Result<Self, SettingsError> {
        Self::load_from(flags, Path::new(DEFAULT_FILE), None)
    }

    /// `environment`: variables to use instead of the process's own.
    fn load_from(
        flags: &Flags,
        default_file: &Path,
        environment: Option<Map<String, String>>,
    ) -> Result<Self, SettingsError> {
        let defaults = Layer::from_toml(Origin::Defaults, Path::new(DEFAULT_FILE), DEFAULTS)?;
        let known = leaves(&defaults.values);
        let mut layers = vec![defaults];
        layers.extend(Layer::from_file(flags.config.as_deref(), default_file)?);
        layers.extend(Layer::from_environment(environment)?);
        layers.extend(flags.overrides().map(|o| Layer::of_one(Origin::Flag(o.flag), o.key, o.value)));
        for layer in &layers {
            layer.refuse_unknown_keys(&known)?;
        }
        let settings = merge(&layers)
            .and_then(Config::try_deserialize::<Self>)
            .map_err(|error| Wrong::from(error).blame(&layers))?;
        settings.check().map_err(|wrong| wrong.blame(&layers))?;
        Ok(settings)
    }

    /// What no value can say alone.
    fn check(&self) -> Result<(), Wrong> {
        let least = self.limits.message_bytes + PACKET_BYTES_BESIDES_TEXT;
        if usize::try_from(self.limits.packet_bytes).is_ok_and(|bytes| bytes < least) {
            return Err(Wrong {
                key: "limits.packet_bytes".into(),
                reason: format!(
                    "{} is too small for messages of limits.message_bytes = {}; {least} is the least",
                    self.limits.packet_bytes, self.limits.message_bytes
                ),
            });
        }
        if self.limits.connect_bytes > self.limits.packet_bytes {
            return Err(Wrong {
                key: "limits.connect_bytes".into(),
                reason: format!(
                    "{} is more than a packet may have: limits.packet_bytes = {}",
                    self.limits.connect_bytes, self.limits.packet_bytes
                ),
            });
        }
        let secret = &self.webhooks.secret;
        if self.webhooks.url.is_some() && secret.len() < SECRET_BYTES_MIN {
            let reason =
                format!("posts are signed with webhooks.secret, which needs {SECRET_BYTES_MIN} bytes at least");
            return Err(if secret.is_empty() {
                Wrong { key: "webhooks.url".into(), reason: format!("{reason} and is empty") }
            } else {
                Wrong { key: "webhooks.secret".into(), reason: format!("it is too short: {reason}") }
            });
        }
        let tls = &self.tls;
        for (key, missing) in [("tls.certificate", tls.key.is_none()), ("tls.key", tls.certificate.is_none())] {
            let has = if key == "tls.certificate" { tls.certificate.is_some() } else { tls.key.is_some() };
            if has && missing {
                let reason = "tls.certificate and tls.key are set together, or neither is".to_owned();
                return Err(Wrong { key: key.into(), reason });
            }
        }
        for (key, address) in [("mqtt.tls_listen", self.mqtt.tls_listen), ("http.tls_listen", self.http.tls_listen)] {
            if address.is_some() && tls.certificate.is_none() && !self.acme.is_on() {
                let reason = "it needs tls.certificate and tls.key, or acme.domains".to_owned();
                return Err(Wrong { key: key.into(), reason });
            }
        }
        self.check_acme()?;
        if self.auth.mode == AuthMode::Required {
            let auth = &self.auth;
            let takes_tokens = auth.jwt_key_file.is_some() || auth.jwt_key_url.is_some();
            if auth.password_file.is_none() && !takes_tokens && tls.client_ca.is_none() {
                let reason =
                    "nobody could log in: set auth.password_file, auth.jwt_key_file, auth.jwt_key_url or tls.client_ca"
                        .to_owned();
                return Err(Wrong { key: "auth.mode".into(), reason });
            }
            let shows_certificates = self.mqtt.tls_listen.is_some() || self.http.tls_listen.is_some();
            if auth.password_file.is_none() && !takes_tokens && !shows_certificates {
                let reason =
                    "nobody could log in: certificates of clients are shown over TLS only, so set mqtt.tls_listen or \
                              http.tls_listen, or a password file or keys besides"
                        .to_owned();
                return Err(Wrong { key: "tls.client_ca".into(), reason });
            }
            return Ok(());
        }
        if tls.client_ca.is_some() {
            let reason =
                "certificates of clients prove nothing in development mode, where everybody is who they say they are: \
                          put authentication on (auth.mode = \"required\"), or leave this out"
                    .to_owned();
            return Err(Wrong { key: "tls.client_ca".into(), reason });
        }
        let addresses = [
            ("mqtt.listen", Some(self.mqtt.listen)),
            ("http.listen", Some(self.http.listen)),
            ("mqtt.tls_listen", self.mqtt.tls_listen),
            ("http.tls_listen", self.http.tls_listen),
        ];
        for (key, address) in addresses.into_iter().filter_map(|(key, address)| Some((key, address?))) {
            if !address.ip().to_canonical().is_loopback() {
                return Err(Wrong {
                    key: key.into(),
                    reason: format!(
                        "{address} can be reached from other machines, and auth.mode = \"development\" lets everyone in under \
                         any name; listen on loopback (127.0.0.1:{port} or [::1]:{port}), or put authentication on \
                         (auth.mode = \"required\", see docs/security.md)",
                        port = address.port()
                    ),
                });
            }
        }
        Ok(())
    }

    /// Where a certificate is asked for it can be checked, and somebody has agreed.
    fn check_acme(&self) -> Result<(), Wrong> {
        if !self.acme.is_on() {
            return Ok(());
        }
        let wrong = |key: &str, reason: &str| Err(Wrong { key: key.into(), reason: reason.to_owned() });
        if self.tls.certificate.is_some() {
            return wrong("acme.domains", "the certificate comes from tls.certificate or is asked for, not both");
        }
        if self.mqtt.tls_listen.is_none() && self.http.tls_listen.is_none() {
            let reason = "whoever issues the certificate checks the domains over TLS: set http.tls_listen or mqtt.tls_listen, \
                          and let port 443 of the domains lead there";
            return wrong("acme.domains", reason);
        }
        if !self.acme.accept_terms {
            let reason =
                "it has to be true: who asks for a certificate agrees to the terms of service of acme.directory";
            return wrong("acme.accept_terms", reason);
        }
        Ok(())
    }

    /// The settings as a file that would give them again, in the order of `config/chatd.toml`. A secret is not shown.
    pub fn to_toml(&self) -> String {
        let values = serde_json::to_value(self).expect("settings are strings and numbers under string keys");
        let mut section = "";
        let mut toml = String::new();
        for line in DEFAULTS.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                let gap = if section.is_empty() { "" } else { "\n" };
                toml.push_str(&format!("{gap}[{name}]\n"));
                section = name;
            } else if let Some((key, _)) = line.split_once('=') {
                // JSON writes strings, integers and lists of them as TOML does.
                toml.push_str(&format!("{key}= {}\n", values[section][key.trim()]));
            }
        }
        toml
    }
}

/// A key and what is wrong with it, before it is known who wrote it.
#[derive(Debug)]
struct Wrong {
    key: String,
    reason: String,
}

impl Wrong {
    /// The last source that set the key is to blame.
    fn blame(self, layers: &[Layer]) -> SettingsError {
        // An entry of a list is set with the list.
        let key = self.key.split('[').next().unwrap_or_default().to_owned();
        let origin = layers
            .iter()
            .rev()
            .find(|layer| leaves(&layer.values).contains(&key))
            .map_or(Origin::Defaults, |layer| layer.origin.clone());
        SettingsError::BadValue { origin, key: self.key, reason: self.reason }
    }
}

impl From<ConfigError> for Wrong {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::At { error, key: Some(key), .. } => Self { key, reason: error.to_string() },
            other => Self { key: String::new(), reason: other.to_string() },
        }
    }
}

/// One source of values.
#[derive(Debug)]
struct Layer {
    origin: Origin,
    values: Map<String, Value>,
}

impl Layer {
    fn from_toml(origin: Origin, path: &Path, toml: &str) -> Result<Self, SettingsError> {
        let values = File::from_str(toml, FileFormat::Toml).collect().map_err(|error| SettingsError::Syntax {
            path: path.to_owned(),
            cause: match error {
                ConfigError::FileParse { cause, .. } => cause.to_string().trim_end().to_owned(),
                other => other.to_string(),
            },
        })?;
        Ok(Self { origin, values })
    }

    /// The named file, which has to exist, or else the default one, which need not.
    fn from_file(named: Option<&Path>, default_file: &Path) -> Result<Option<Self>, SettingsError> {
        let path = named.unwrap_or(default_file);
        match std::fs::read_to_string(path) {
            Ok(toml) => Self::from_toml(Origin::File(path.to_owned()), path, &toml).map(Some),
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(SettingsError::Unreadable { path: path.to_owned(), cause }),
        }
    }

    /// A layer for each variable, so that each can be named. Empty variables count as unset.
    fn from_environment(variables: Option<Map<String, String>>) -> Result<Vec<Self>, SettingsError> {
        let values = Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator("__")
            .separator("__")
            .ignore_empty(true)
            .source(variables)
            .collect()
            .map_err(|error| SettingsError::Environment { cause: error.to_string() })?;
        let layer = |(key, value): (String, Value)| {
            let variable = format!("{ENVIRONMENT_PREFIX}__{}", key.replace('.', "__").to_uppercase());
            Self { origin: Origin::Environment(variable), values: Map::from([(key, value)]) }
        };
        Ok(values.into_iter().map(layer).collect())
    }

    fn of_one(origin: Origin, key: &str, value: &str) -> Self {
        Self { origin, values: Map::from([(key.to_owned(), Value::from(value))]) }
    }

    fn refuse_unknown_keys(&self, known: &[String]) -> Result<(), SettingsError> {
        let Some(key) = leaves(&self.values).into_iter().find(|key| !known.contains(key)) else { return Ok(()) };
        let section = key.split_once('.').map_or(key.as_str(), |(section, _)| section);
        let in_section: Vec<&str> =
            known.iter().filter_map(|known| known.strip_prefix(section)?.strip_prefix('.')).collect();
        let reason = if in_section.is_empty() {
            let mut sections: Vec<&str> = known.iter().filter_map(|known| Some(known.split_once('.')?.0)).collect();
            sections.dedup();
            format!("the sections are {}", sections.join(", "))
        } else {
            format!("the keys of [{section}] are {}", in_section.join(", "))
        };
        Err(SettingsError::UnknownKey { origin: self.origin.clone(), key, reason })
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(Self { origin: self.origin.clone(), values: self.values.clone() })
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.values.clone())
    }
}

fn merge(layers: &[Layer]) -> Result<Config, ConfigError> {
    let mut builder = Config::builder();
    for layer in layers {
        builder = builder.add_source(Layer { origin: layer.origin.clone(), values: layer.values.clone() });
    }
    builder.build()
}

/// The keys that hold values, `section.key`, sorted.
fn leaves(values: &Map<String, Value>) -> Vec<String> {
    fn collect(prefix: &str, values: &Map<String, Value>, found: &mut Vec<String>) {
        for (key, value) in values {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match &value.kind {
                // A section may be empty.
                ValueKind::Table(table) => collect(&key, table, found),
                _ => found.push(key),
            }
        }
    }
    let mut found = Vec::new();
    collect("", values, &mut found);
    found.sort();
    found
}

/// A whole number. In the environment it is text, so text that says a number will do; fractions and booleans will not.
struct Number;

impl de::Visitor<'_> for Number {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::custom(format!("{value} is negative")))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<u64, E> {
        value.parse().map_err(|_| E::custom(format!("{value:?} is not a whole number")))
    }
}

fn within<'de, D, T, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let value = deserializer.deserialize_any(Number)?;
    T::try_from(value)
        .ok()
        .filter(|_| (MIN..=MAX).contains(&value))
        .ok_or_else(|| de::Error::custom(format!("{value} is not between {MIN} and {MAX}")))
}

/// The same, or zero.
fn zero_or_within<'de, D, T, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let value = deserializer.deserialize_any(Number)?;
    T::try_from(value)
        .ok()
        .filter(|_| value == 0 || (MIN..=MAX).contains(&value))
        .ok_or_else(|| de::Error::custom(format!("{value} is neither 0 nor between {MIN} and {MAX}")))
}

fn milliseconds_within<'de, D, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    within::<D, u64, MIN, MAX>(deserializer).map(Duration::from_millis)
}

fn as_milliseconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(duration.as_millis()).expect("it was read from a u64 of milliseconds"))
}

fn seconds_within<'de, D, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    within::<D, u64, MIN, MAX>(deserializer).map(Duration::from_secs)
}

fn as_seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_secs())
}

fn days_within<'de, D, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    within::<D, u64, MIN, MAX>(deserializer).map(|days| Duration::from_secs(days * SECONDS_PER_DAY))
}

fn as_days<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_secs() / SECONDS_PER_DAY)
}

/// True or false, also as text, as in the environment.
struct YesOrNo;

impl de::Visitor<'_> for YesOrNo {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true or false")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<bool, E> {
        Ok(value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<bool, E> {
        value.parse().map_err(|_| E::custom(format!("{value:?} is neither true nor false")))
    }
}

fn yes_or_no<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    deserializer.deserialize_any(YesOrNo)
}

/// Text and nothing else: a number in place of a name is a mistake.
struct Text;

impl de::Visitor<'_> for Text {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text in quotes")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }
}

fn text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    deserializer.deserialize_any(Text)?.parse().map_err(de::Error::custom)
}

/// Texts: a list of them, or one with commas between, as in the environment.
struct Texts;

impl<'de> de::Visitor<'de> for Texts {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of texts in quotes")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Vec<String>, E> {
        Ok(value.split(',').map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect())
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element_seed(OneText)? {
            texts.push(text);
        }
        Ok(texts)
    }
}

struct OneText;

impl<'de> de::DeserializeSeed<'de> for OneText {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(Text)
    }
}

fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: fmt::Display,
{
    let texts = deserializer.deserialize_any(Texts)?;
    let parse = |text: String| text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")));
    texts.into_iter().map(parse).collect()
}

fn as_list<T: fmt::Display, S: Serializer>(list: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(list.iter().map(T::to_string))
}

fn optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    let text = deserializer.deserialize_any(Text)?;
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(de::Error::custom) }
}

fn as_optional<T: fmt::Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.as_ref().map(T::to_string).unwrap_or_default())
}

fn any_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_any(Text)
}

/// Empty: none.
fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = deserializer.deserialize_any(Text)?;
    Ok((!path.is_empty()).then(|| path.into()))
}

fn as_optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.clone().unwrap_or_default().serialize(serializer)
}

/// Too short to be taken for a secret, should somebody copy it.
fn as_hidden<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if secret.is_empty() { "" } else { "(hidden)" })
}

fn listen_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let address = deserializer.deserialize_any(Text)?;
    parse_address(&address).map_err(de::Error::custom)
}

/// Empty: none.
fn optional_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let address = deserializer.deserialize_any(Text)?;
    if address.is_empty() { Ok(None) } else { parse_address(&address).map(Some).map_err(de::Error::custom) }
}

fn parse_address(address: &str) -> Result<SocketAddr, String> {
    let example = "such as 127.0.0.1:1883 or [::1]:1883";
    address.parse().map_err(|_| format!("{address:?} is not an IP address and a port, {example}"))
}

fn folder<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = deserializer.deserialize_any(Text)?;
    if path.is_empty() {
        return Err(de::Error::custom("it is empty; name a folder"));
    }
    Ok(path.into())
}

impl FromStr for AuthMode {
    type Err = String;

    fn from_str(mode: &str) -> Result<Self, String> {
        match mode {
            "development" => Ok(Self::Development),
            "required" => Ok(Self::Required),
            _ => Err(format!("{mode:?} is not one of development, required")),
        }
    }
}

impl FromStr for MetricsFor {
    type Err = String;

    fn from_str(whom: &str) -> Result<Self, String> {
        match whom {
            "loopback" => Ok(Self::Loopback),
            "everybody" => Ok(Self::Everybody),
            "off" => Ok(Self::Off),
            _ => Err(format!("{whom:?} is not one of loopback, everybody, off")),
        }
    }
}

impl FromStr for WebhookEvent {
    type Err = String;

    fn from_str(event: &str) -> Result<Self, String> {
        let all = [Self::MessageStored, Self::MessageWaiting, Self::Presence];
        let found = all.into_iter().find(|one| one.to_string() == event);
        found.ok_or_else(|| "it is not one of message.stored, message.waiting, presence".to_owned())
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(format: &str) -> Result<Self, String> {
        match format {
            "auto" => Ok(Self::Auto),
            "pretty" => Ok(Self::Pretty),
            "json" => Ok(Self::Json),
            _ => Err(format!("{format:?} is not one of auto, pretty, json")),
        }
    }
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(level: &str) -> Result<Self, String> {
        // EnvFilter takes a lone word for a crate's name, and empty text for silence: both are mistakes here.
        let mistyped = |directive: &str| {
            let directive = directive.trim();
            directive.is_empty()
                || (!directive.contains(['=', '[', ':', '_'])
                    && !matches!(
                        directive.to_ascii_lowercase().as_str(),
                        "off" | "error" | "warn" | "info" | "debug" | "trace"
                    ))
        };
        if let Some(directive) = level.split(',').find(|directive| mistyped(directive)) {
            return Err(format!(
                "{:?} is not one of off, error, warn, info, debug, trace, or a directive such as broker=debug",
                directive.trim()
            ));
        }
        EnvFilter::try_new(level).map_err(|error| format!("{level:?}: {error}"))?;
        Ok(Self(level.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Settings from a file's text, variables and flags, with nothing taken from this process.
    fn load(toml: &str, variables: &[(&str, &str)], flags: Flags) -> Result<Settings, SettingsError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chatd.toml");
        std::fs::write(&file, toml).unwrap();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Settings::load_from(&flags, &file, Some(variables))
    }

    fn refusal(toml: &str) -> String {
        let error = load(toml, &[], Flags::default()).unwrap_err().to_string();
        assert!(error.contains("chatd.toml: "), "the file is not named: {error}");
        error
    }

    fn environment_refusal(name: &str, value: &str) -> String {
        load("", &[(name, value)], Flags::default()).unwrap_err().to_string()
    }

    fn defaults() -> Settings {
        load("", &[], Flags::default()).unwrap()
    }

    #[track_caller]
    fn assert_says(error: &str, parts: &[&str]) {
        for part in parts {
            assert!(error.contains(part), "{part:?} is missing in {error:?}");
        }
    }

    #[test]
    fn the_file_has_exactly_the_keys_of_the_settings() {
        let in_file: BTreeSet<String> =
            leaves(&File::from_str(DEFAULTS, FileFormat::Toml).collect().unwrap()).into_iter().collect();
        // A list counts as nothing there when it is empty.
        let mut full = defaults();
        full.auth.observers.push("eve".parse().unwrap());
        full.http.origins.push(AllowedOrigin::Any);
        full.acme.domains.push("chat.example.org".parse().unwrap());
        let in_code: BTreeSet<String> =
            leaves(&Config::try_from(&full).unwrap().collect().unwrap()).into_iter().collect();
        assert_eq!(in_file, in_code);
    }

    #[test]
    fn every_key_of_the_file_is_commented() {
        let mut commented = false;
        for line in DEFAULTS.lines() {
            match line {
                "" => commented = false,
                line if line.starts_with('#') => commented = true,
                line => assert!(commented || line.starts_with('['), "no comment above {line:?}"),
            }
        }
    }

    #[test]
    fn defaults_are_those_promised() {
        let settings = defaults();
        assert_eq!(settings.mqtt.listen, "127.0.0.1:1883".parse().unwrap());
        assert_eq!(settings.http.listen, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(settings.storage.path, Path::new("chatd-data"));
        assert_eq!(settings.limits.message_bytes, 16 * 1024);
        assert_eq!(settings.limits.connect_timeout, Duration::from_secs(10));
        assert_eq!(settings.limits.idle_timeout, Duration::from_secs(86_400));
        assert_eq!(settings.limits.session_expiry_max_s, u32::MAX);
    }

    #[test]
    fn effective_settings_are_a_settings_file() {
        let changed = load(
            "[limits]\nidle_timeout_ms = 5\n[storage]\npath = 'a \"quoted\" folder'",
            &[("CHATD__LOG__FORMAT", "json")],
            Flags::default(),
        )
        .unwrap();
        assert_ne!(changed, defaults());
        let toml = changed.to_toml();
        assert_eq!(load(&toml, &[], Flags::default()).unwrap(), changed, "{toml}");
        assert_says(&toml, &["[mqtt]\nlisten = \"127.0.0.1:1883\"\n", "idle_timeout_ms = 5\n", "format = \"json\"\n"]);
    }

    #[test]
    fn names_are_a_list_or_have_commas_between() {
        let names = |settings: Settings| settings.auth.observers.iter().map(UserId::to_string).collect::<Vec<_>>();
        let in_file = load("[auth]\nobservers = ['eve', 'the-bot']", &[], Flags::default()).unwrap();
        assert_eq!(names(in_file.clone()), ["eve", "the-bot"]);
        assert_eq!(load(&in_file.to_toml(), &[], Flags::default()).unwrap(), in_file);
        let in_environment = load("", &[("CHATD__AUTH__OBSERVERS", "eve, the-bot,")], Flags::default()).unwrap();
        assert_eq!(in_environment, in_file);
        assert_says(&refusal("[auth]\nobservers = ['eve', 'a/b']"), &["auth.observers", "a/b"]);
        assert_says(&refusal("[auth]\nobservers = [1]"), &["auth.observers", "text in quotes"]);
    }

    #[test]
    fn the_edge_has_the_same_defaults() {
        let (settings, edge) = (defaults().limits, broker::Limits::default());
        assert_eq!(format!("{:?}", crate::server::broker_limits(&settings)), format!("{edge:?}"));
    }

    #[test]
    fn networks_are_a_list() {
        let toml = "[limits]\nuncounted_addresses = ['10.0.0.0/8', '2001:db8::7']";
        let settings = load(toml, &[], Flags::default()).unwrap();
        let written: Vec<String> = settings.limits.uncounted_addresses.iter().map(Network::to_string).collect();
        assert_eq!(written, ["10.0.0.0/8", "2001:db8::7/128"]);
        assert_eq!(load(&settings.to_toml(), &[], Flags::default()).unwrap(), settings);
        let none = load("[limits]\nuncounted_addresses = []", &[], Flags::default()).unwrap();
        assert!(none.limits.uncounted_addresses.is_empty());
        for network in ["proxy", "10.0.0.0/33"] {
            let error = refusal(&format!("[limits]\nuncounted_addresses = ['{network}']"));
            assert_says(&error, &["limits.uncounted_addresses", network]);
        }
    }

    #[test]
    fn a_connect_is_a_packet() {
        let error = refusal("[limits]\nconnect_bytes = 2000000");
        assert_says(&error, &["bad value for `limits.connect_bytes`", "limits.packet_bytes = 1048576"]);
        assert_says(&refusal("[limits]\ntopic_bytes = 255"), &["`limits.topic_bytes`", "neither 0 nor between 256"]);
        assert_eq!(load("[limits]\ntopic_bytes = 0", &[], Flags::default()).unwrap().limits.topic_bytes, 0);
    }

    #[test]
    fn authentication_opens_the_network_and_needs_a_way_in() {
        let settings = load(
            "[mqtt]\nlisten = '0.0.0.0:1883'\n[auth]\nmode = 'required'\npassword_file = 'users'",
            &[],
            Flags::default(),
        );
        assert_eq!(settings.unwrap().auth.password_file, Some("users".into()));
        assert_says(&refusal("[auth]\nmode = 'required'"), &["`auth.mode`", "auth.password_file"]);
        let certificates = "[tls]\ncertificate = 'c'\nkey = 'k'\nclient_ca = 'a'";
        let required = format!("{certificates}\n[auth]\nmode = 'required'");
        assert_says(&refusal(&required), &["`tls.client_ca`", "mqtt.tls_listen"]);
        load(&format!("{required}\n[mqtt]\ntls_listen = '127.0.0.1:0'"), &[], Flags::default()).unwrap();
        load(&format!("{required}\npassword_file = 'users'"), &[], Flags::default()).unwrap();
        assert_says(&refusal(certificates), &["`tls.client_ca`", "auth.mode"]);
    }

    #[test]
    fn metrics_are_for_somebody() {
        assert_eq!(defaults().http.metrics, MetricsFor::Loopback);
        for (word, whom) in [("everybody", MetricsFor::Everybody), ("off", MetricsFor::Off)] {
            let settings = load(&format!("[http]\nmetrics = '{word}'"), &[], Flags::default()).unwrap();
            assert_eq!(settings.http.metrics, whom);
        }
        assert_says(&refusal("[http]\nmetrics = 'admins'"), &["http.metrics", "loopback, everybody, off"]);
    }

    #[test]
    fn keys_come_by_https_or_from_this_machine() {
        let url = |url: &str| format!("[auth]\nmode = 'required'\njwt_key_url = '{url}'\njwt_key_refresh_s = 60");
        for good in
            ["https://id.example.com/keys", "http://127.0.0.1:8081/keys", "http://[::1]/keys", "http://localhost/keys"]
        {
            let settings = load(&url(good), &[], Flags::default()).unwrap();
            assert_eq!(settings.auth.jwt_key_url.as_ref().unwrap().to_string(), good);
            assert_eq!(settings.auth.jwt_key_refresh, Duration::from_secs(60));
            assert_eq!(load(&settings.to_toml(), &[], Flags::default()).unwrap(), settings);
        }
        for bad in [
            "http://id.example.com/keys",
            "http://127.0.0.1.example.com/",
            "file:///etc/keys",
            "id.example.com",
            "https://a:b@id.example.com/",
        ] {
            assert_says(&refusal(&url(bad)), &["`auth.jwt_key_url`"]);
        }
        assert_says(&refusal("[auth]\njwt_key_refresh_s = 29"), &["`auth.jwt_key_refresh_s`", "29 is not between"]);
    }

    #[test]
    fn origins_are_origins() {
        let settings =
            load("[http]\norigins = ['https://App.example.org:443', 'http://x:81']", &[], Flags::default()).unwrap();
        let written = settings.http.origins.iter().map(AllowedOrigin::to_string).collect::<Vec<_>>();
        assert_eq!(written, ["https://app.example.org", "http://x:81"]);
        assert_eq!(load(&settings.to_toml(), &[], Flags::default()).unwrap(), settings);
        let every = load("", &[("CHATD__HTTP__ORIGINS", "*")], Flags::default()).unwrap();
        assert_eq!(every.http.origins, [AllowedOrigin::Any]);
        assert_says(
            &refusal("[http]\norigins = ['https://app.example.org/']"),
            &["http.origins", "https://app.example.org/"],
        );
        assert_says(&refusal("[http]\norigins = ['app.example.org']"), &["http.origins", "is no origin"]);
    }

    #[test]
    fn a_certificate_is_asked_for_where_it_can_be_checked() {
        let acme = |rest: &str| format!("[acme]\ndomains = ['Chat.example.org']\n{rest}");
        let listening = "[http]\ntls_listen = '127.0.0.1:0'";
        let settings = load(&acme(&format!("accept_terms = true\n{listening}")), &[], Flags::default()).unwrap();
        assert_eq!(settings.acme.domains[0].to_string(), "chat.example.org");
        assert_eq!(load(&settings.to_toml(), &[], Flags::default()).unwrap(), settings);
        let variables = [("CHATD__ACME__ACCEPT_TERMS", "true"), ("CHATD__HTTP__TLS_LISTEN", "127.0.0.1:0")];
        assert!(load(&acme(""), &variables, Flags::default()).is_ok());
        assert_says(&refusal(&acme("accept_terms = true")), &["`acme.domains`", "http.tls_listen", "443"]);
        let pair = "[tls]\ncertificate = 'a'\nkey = 'b'";
        assert_says(&refusal(&acme(&format!("{listening}\n{pair}"))), &["`acme.domains`", "tls.certificate"]);
        let disagrees = load(&acme(listening), &[], Flags::default()).unwrap_err().to_string();
        assert_says(&disagrees, &["`acme.accept_terms`", "terms of service"]);
        assert_says(&refusal(&acme("accept_terms = 1")), &["`acme.accept_terms`", "true or false"]);
        for (key, wrong) in
            [("domains", "['*.example.org']"), ("domains", "['a b']"), ("directory", "'http://ca.example.org'")]
        {
            assert_says(&refusal(&format!("[acme]\n{key} = {wrong}")), &[&format!("acme.{key}")]);
        }
    }

    #[test]
    fn webhooks_need_a_secret_that_is_not_shown() {
        let secret = "correct horse battery staple";
        let hooks = |rest: &str| format!("[webhooks]\nurl = 'http://127.0.0.1:9/hook'\n{rest}");
        let settings = load(&hooks(&format!("secret = '{secret}'")), &[], Flags::default()).unwrap();
        assert_eq!(settings.webhooks.url.as_ref().unwrap().to_string(), "http://127.0.0.1:9/hook");
        for shown in [settings.to_toml(), format!("{settings:?}")] {
            assert!(!shown.contains("horse"), "{shown}");
        }
        let copied = refusal(&settings.to_toml());
        assert_says(&copied, &["webhooks.secret", "too short"]);
        assert_says(&refusal(&hooks("")), &["`webhooks.url`", "webhooks.secret", "empty", "16 bytes"]);
        let short =
            load(&hooks(""), &[("CHATD__WEBHOOKS__SECRET", "short")], Flags::default()).unwrap_err().to_string();
        assert_says(&short, &["CHATD__WEBHOOKS__SECRET", "too short"]);
        assert_says(&refusal("[webhooks]\nurl = 'example.com'"), &["webhooks.url", "http://"]);
        assert_says(
            &refusal("[webhooks]\nevents = ['message.lost']"),
            &["webhooks.events", "message.lost", "presence"],
        );
    }

    #[test]
    fn later_sources_win() {
        let toml = "[limits]\nwindow = 2\nconnections = 2\n[log]\nlevel = 'error'\n";
        let variables = [("CHATD__LIMITS__WINDOW", "3"), ("CHATD__LOG__LEVEL", "warn"), ("CHATD__MQTT__LISTEN", "")];
        let flags =
            Flags { log_level: Some("debug".into()), mqtt_listen: Some("127.0.0.1:0".into()), ..Flags::default() };
        let settings = load(toml, &variables, flags).unwrap();
        assert_eq!(settings.limits.connections, 2, "the file wins over the defaults");
        assert_eq!(settings.limits.window, 3, "the environment wins over the file");
        assert_eq!(settings.log.level.as_str(), "debug", "a flag wins over the environment");
        assert_eq!(settings.mqtt.listen.port(), 0);
    }

    #[test]
    fn a_bad_value_that_a_later_source_replaces_does_no_harm() {
        let flags = Flags { mqtt_listen: Some("127.0.0.1:0".into()), ..Flags::default() };
        assert!(load("[mqtt]\nlisten = '0.0.0.0:1883'", &[], flags).is_ok());
    }

    #[test]
    fn the_named_file_has_to_exist_and_the_default_one_need_not() {
        let nowhere = tempfile::tempdir().unwrap().path().join("none.toml");
        assert_eq!(Settings::load_from(&Flags::default(), &nowhere, Some(Map::new())).unwrap(), defaults());
        let flags = Flags { config: Some(nowhere.clone()), ..Flags::default() };
        let error = Settings::load_from(&flags, &nowhere, Some(Map::new())).unwrap_err();
        assert!(matches!(error, SettingsError::Unreadable { ref path, .. } if *path == nowhere), "{error}");
    }

    #[test]
    fn a_file_that_is_not_toml_is_refused_with_its_line() {
        assert_says(&refusal("[mqtt]\nlisten = \n"), &["not valid TOML", "line 2"]);
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert_says(&refusal("[limits]\nmessage_byte = 1"), &["unknown key `limits.message_byte`", "message_bytes"]);
        assert_says(&refusal("[limit]\nwindow = 1"), &["unknown key `limit.window`", "the sections are", "limits"]);
        assert_says(&refusal("window = 1"), &["unknown key `window`"]);
        assert_says(&refusal("mqtt = '127.0.0.1:1'"), &["unknown key `mqtt`", "the keys of [mqtt] are listen"]);
        assert_says(&refusal("[mqtt.listen]\nport = 1"), &["unknown key `mqtt.listen.port`"]);
        assert_says(
            &environment_refusal("CHATD__MQTT__PORT", "1"),
            &["environment variable CHATD__MQTT__PORT: unknown key `mqtt.port`"],
        );
        assert_says(&environment_refusal("CHATD__MQTT", "1"), &["environment variable CHATD__MQTT: unknown key"]);
    }

    #[test]
    fn variables_of_others_are_left_alone() {
        let variables = [("CHATD_LOG", "x"), ("CHATDX__Y", "z"), ("PATH", "/bin")];
        assert_eq!(load("", &variables, Flags::default()).unwrap(), defaults());
    }

    #[test]
    fn numbers_have_to_be_whole_and_in_range() {
        for (value, reason) in [
            ("0", "0 is not between 1 and"),
            ("-5", "-5 is negative"),
            ("1.5", "a whole number"),
            ("true", "a whole number"),
            ("'many'", "\"many\" is not a whole number"),
            ("[1]", "a whole number"),
            ("99999999999", "not between 1 and 1048576"),
        ] {
            let error = refusal(&format!("[limits]\nmessage_bytes = {value}"));
            assert_says(&error, &["bad value for `limits.message_bytes`", reason]);
        }
        for (key, value) in [
            ("connections", "0"),
            ("connect_timeout_ms", "0"),
            ("tls_timeout_ms", "0"),
            ("websocket_timeout_ms", "600001"),
            ("shutdown_timeout_ms", "600001"),
            ("receive_maximum", "65536"),
            ("window", "0"),
            ("topic_levels", "4"),
            ("subscriptions_per_session", "0"),
            ("session_expiry_max_s", "4294967296"),
            ("connect_bytes", "1023"),
            ("keep_alive_max_s", "65536"),
            ("publishes_per_s", "1000000001"),
            ("user_publish_bytes_per_s", "4294967296"),
            ("new_conversations_per_hour", "1000001"),
            ("queue_messages", "0"),
            ("queue_bytes", "0"),
            ("queues_bytes", "0"),
            ("packet_bytes", "268435456"),
        ] {
            let variable = format!("CHATD__LIMITS__{}", key.to_uppercase());
            let start =
                format!("environment variable {variable}: bad value for `limits.{key}`: {value} is not between");
            assert_says(&environment_refusal(&variable, value), &[&start]);
        }
    }

    #[test]
    fn a_packet_has_room_for_a_message() {
        let error = refusal("[limits]\npacket_bytes = 16384");
        assert_says(
            &error,
            &["bad value for `limits.packet_bytes`", "limits.message_bytes = 16384", "17408 is the least"],
        );
    }

    #[test]
    fn names_have_to_be_right() {
        assert_says(&refusal("[auth]\nmode = 'none'"), &["`auth.mode`", "\"none\"", "development, required"]);
        assert_says(&refusal("[log]\nformat = 'xml'"), &["`log.format`", "auto, pretty, json"]);
        assert_says(&refusal("[log]\nlevel = 'loud'"), &["`log.level`", "\"loud\"", "info"]);
        assert_says(&refusal("[log]\nlevel = 'info,broker=loud'"), &["`log.level`"]);
        assert_says(&refusal("[log]\nlevel = 3"), &["`log.level`", "text in quotes"]);
        assert_says(&refusal("[storage]\npath = ''"), &["`storage.path`", "name a folder"]);
        assert!(load("[log]\nlevel = 'info,broker=debug'", &[], Flags::default()).is_ok());
    }

    #[test]
    fn listen_addresses_have_to_be_addresses() {
        for address in ["1883", "127.0.0.1", "localhost:1883", "127.0.0.1:70000", ""] {
            assert_says(&refusal(&format!("[mqtt]\nlisten = '{address}'")), &["`mqtt.listen`", "127.0.0.1:1883"]);
        }
        let flags = Flags { http_listen: Some("here".into()), ..Flags::default() };
        let error = load("", &[], flags).unwrap_err().to_string();
        assert_says(&error, &["flag --http-listen: bad value for `http.listen`", "\"here\""]);
    }

    #[test]
    fn without_authentication_only_loopback_is_listened_on() {
        for address in ["0.0.0.0:1883", "[::]:1883", "192.168.1.2:1883", "[::ffff:10.0.0.1]:1883"] {
            let error = refusal(&format!("[mqtt]\nlisten = '{address}'"));
            assert_says(&error, &["`mqtt.listen`", "listen on loopback (127.0.0.1:1883", "put authentication on"]);
        }
        assert_says(&environment_refusal("CHATD__HTTP__LISTEN", "0.0.0.0:0"), &["CHATD__HTTP__LISTEN", "loopback"]);
        for address in ["127.0.0.1:0", "[::1]:0", "127.8.9.1:1883", "[::ffff:127.0.0.1]:0"] {
            assert!(load(&format!("[http]\nlisten = '{address}'"), &[], Flags::default()).is_ok(), "{address}");
        }
    }
}
