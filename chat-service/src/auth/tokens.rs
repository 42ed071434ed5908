//! JSON Web Tokens in place of passwords: whose key signed them, for whom, and until when.
//!
//! A key has one algorithm, which the key decides and never the token. A token needs `sub`, the user, and `exp`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use broker::service::Credential;
use chat_protocol::UserId;
use jsonwebtoken::dangerous::insecure_decode_claims;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, Validation, decode, decode_header};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{Role, fingerprint};

/// A shorter secret is guessed too easily (RFC 7518, section 3.2).
const SECRET_BYTES_MIN: usize = 32;
/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Keys of a set: a token that names none is tried with all of them.
const KEYS_MAX: usize = 100;
/// Clocks may differ by so much.
const LEEWAY_S: u64 = 5;

/// What is wrong with a file of keys.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct KeyError {
    path: PathBuf,
    reason: String,
}

/// A key that tokens are checked with.
#[derive(Clone)]
struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
    credential: Credential,
}

impl Key {
    fn new(id: Option<String>, algorithm: Algorithm, key: DecodingKey) -> Self {
        let parts = match key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => [bytes.as_slice(), &[]],
            DecodingKeyKind::RsaModulusExponent { n, e } => [n.as_slice(), e],
        };
        let credential = fingerprint(&parts);
        Self { id, algorithm, key, credential }
    }
}

/// Some keys.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// Keys of a file: a PEM public key (RSA: RS256, P-256: ES256, Ed25519: EdDSA), a JWK or a set of them, or else a secret (HS256).
    ///
    /// # Errors
    /// The file cannot be read, or has no key that can be used.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let error = |reason: String| KeyError { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|cause| error(cause.to_string()))?;
        Self::parse(&bytes).map_err(error)
    }

    /// What such a file says.
    ///
    /// # Errors
    /// Why it has no key that can be used.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        keys(bytes).map(Self)
    }

    /// The public keys of a set, perhaps none. A secret that is fetched is none.
    ///
    /// # Errors
    /// Why it is no set of keys.
    pub fn parse_public_set(text: &str) -> Result<Self, String> {
        let set = serde_json::from_str::<Set>(text).map_err(|error| format!("it is no set of JWKs: {error}"))?;
        let is_public = |key: &Key| key.algorithm != Algorithm::HS256;
        Ok(Self(set.keys()?.into_iter().filter(is_public).collect()))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is the same keys under the same names.
    pub fn is_same(&self, other: &Self) -> bool {
        let names = |keys: &Self| -> Vec<_> { keys.0.iter().map(|key| (key.id.clone(), key.credential.0)).collect() };
        names(self) == names(other)
    }
}

/// Why a token proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is no token, or no key here has signed it.
    #[error("{reason}")]
    Forged {
        reason: String,
        /// It names a key that is not here, so perhaps it is only too early.
        names_unknown_key: bool,
    },
    /// A key here has signed it, but not for this, or not for now. Whoever has such a token guesses nothing.
    #[error("{0}")]
    NotValid(String),
    /// No key is here that could have signed it, so there was nothing to guess.
    #[error("it names a key that is not known here")]
    UnknownKey,
}

impl TokenError {
    fn forged(reason: &str) -> Self {
        Self::Forged { reason: reason.to_owned(), names_unknown_key: false }
    }

    /// Whether another set of keys might say something else.
    pub fn names_unknown_key(&self) -> bool {
        matches!(self, Self::UnknownKey | Self::Forged { names_unknown_key: true, .. })
    }
}

/// What a token has to say, besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// `aud`; empty: any.
    pub audience: String,
    /// `iss`; empty: any.
    pub issuer: String,
    /// The name of the claim that lists roles.
    pub roles: String,
}

/// The keys that are taken, and what else a token needs.
#[derive(Clone)]
pub struct Tokens {
    keys: Vec<Key>,
    claims: Claims,
}

/// What a token says before anybody has looked at its signature.
#[derive(Deserialize)]
struct Claimed {
    sub: String,
}

/// What a token proves.
#[derive(Debug, PartialEq, Eq)]
pub struct Proof {
    pub user: UserId,
    pub roles: Vec<Role>,
    pub expires_at: Instant,
    /// The key that signed it.
    pub credential: Credential,
}

/// What a token says, each thing once.
struct Body(Map<String, Value>);

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Body;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
                let mut members = Map::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if members.contains_key(&name) {
                        return Err(de::Error::custom("it says something twice"));
                    }
                    members.insert(name, value);
                }
                Ok(Body(members))
            }
        }

        deserializer.deserialize_map(Members)
    }
}

impl Body {
    /// In seconds since 1970, a fraction cut off (RFC 7519, NumericDate); `None` if it is not said.
    fn date_s(&self, name: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        let fraction = || {
            let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0)?;
            Duration::try_from_secs_f64(seconds).ok().map(|whole| whole.as_secs())
        };
        let seconds = value.as_u64().or_else(fraction);
        seconds.map(Some).ok_or_else(|| format!("{name}: it is no time in seconds since 1970"))
    }

    fn text(&self, name: &str) -> Result<&str, String> {
        let value = self.0.get(name).ok_or_else(|| format!("{name}: it is missing"))?;
        value.as_str().ok_or_else(|| format!("{name}: it is no text"))
    }

    /// Whether a claim is this, or a list with this in it.
    fn names(&self, name: &str, wanted: &str) -> bool {
        match self.0.get(name) {
            Some(Value::String(one)) => one == wanted,
            Some(Value::Array(list)) => list.iter().any(|one| one.as_str() == Some(wanted)),
            _ => false,
        }
    }
}

impl Tokens {
    pub fn new(keys: impl IntoIterator<Item = Keys>, claims: Claims) -> Self {
        Self { keys: keys.into_iter().flat_map(|keys| keys.0).collect(), claims }
    }

    /// Whether the key that signed something is still here.
    pub fn has_key(&self, credential: Credential) -> bool {
        self.keys.iter().any(|key| key.credential == credential)
    }

    /// Whom a token names, true or not.
    pub fn claimed_user(token: &[u8]) -> Option<UserId> {
        let token = token.get(..TOKEN_BYTES_MAX.min(token.len()))?;
        let claimed: Claimed = insecure_decode_claims(token).ok()?;
        UserId::parse(&claimed.sub).ok()
    }

    /// Whether something that was sent as a password looks like a token.
    pub fn is_token(password: &[u8]) -> bool {
        std::str::from_utf8(password).is_ok_and(|text| text.split('.').count() == 3 && decode_header(text).is_ok())
    }

    /// Who a token says its bearer is.
    ///
    /// # Errors
    /// Why it proves nothing.
    pub fn check(&self, token: &[u8]) -> Result<Proof, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::forged(&format!("a token has at most {TOKEN_BYTES_MAX} bytes")));
        }
        let no_token = || TokenError::forged("it is no token");
        let token = std::str::from_utf8(token).map_err(|_| no_token())?;
        // Of the header only `alg` and `kid` are looked at, and those are only compared: `jku`, `x5u` and `jwk` say nothing here.
        let header = decode_header(token).map_err(|_| no_token())?;
        if header.crit.is_some() {
            // RFC 7515, section 4.1.11: whoever does not understand it has to refuse it.
            return Err(TokenError::NotValid("crit: it names something that is not understood here".to_owned()));
        }
        let named = |key: &&Key| match (&key.id, &header.kid) {
            (Some(id), Some(named)) => id == named,
            _ => true,
        };
        let is_known = |kid: &String| self.keys.iter().any(|key| key.id.as_ref() == Some(kid));
        let names_unknown_key = header.kid.as_ref().is_some_and(|kid| !is_known(kid));
        let mut error = None;
        for key in self.keys.iter().filter(named).filter(|key| key.algorithm == header.alg) {
            match decode::<Body>(token, &key.key, &signature_only(key.algorithm)) {
                Ok(found) => return self.proof(&found.claims, key.credential).map_err(TokenError::NotValid),
                // The header was read before, and the signature is looked at before the body: it was right.
                Err(found) if matches!(found.kind(), ErrorKind::Json(_)) => {
                    return Err(TokenError::NotValid(format!("what it says cannot be read: {found}")));
                }
                Err(found) => error = Some(found.to_string()),
            }
        }
        // A public key is not guessed by trying. A secret is, whatever name is put to it.
        let is_guess = !names_unknown_key || header.alg == Algorithm::HS256;
        Err(match error {
            Some(reason) if is_guess => TokenError::Forged { reason, names_unknown_key },
            Some(_) => TokenError::UnknownKey,
            None if names_unknown_key || self.keys.is_empty() => TokenError::UnknownKey,
            None => TokenError::forged("no key here has signed such a token"),
        })
    }

    fn proof(&self, body: &Body, credential: Credential) -> Result<Proof, String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires_s = body.date_s("exp")?.ok_or_else(|| "exp: it is missing".to_owned())?;
        if expires_s.saturating_add(LEEWAY_S) < now.as_secs() {
            return Err("exp: it has expired".to_owned());
        }
        if body.date_s("nbf")?.is_some_and(|from_s| from_s > now.as_secs().saturating_add(LEEWAY_S)) {
            return Err("nbf: it is not valid yet".to_owned());
        }
        for (name, wanted) in [("aud", &self.claims.audience), ("iss", &self.claims.issuer)] {
            if !wanted.is_empty() && !body.names(name, wanted) {
                return Err(format!("{name}: it is not {wanted:?}"));
            }
        }
        let user = UserId::parse(body.text("sub")?).map_err(|error| format!("sub: {error}"))?;
        let roles = match body.0.get(&self.claims.roles) {
            // Roles of other services may be in the same list.
            Some(Value::Array(names)) => names.iter().filter_map(|name| name.as_str()?.parse().ok()).collect(),
            Some(Value::String(names)) => names.split_whitespace().filter_map(|name| name.parse().ok()).collect(),
            _ => Vec::new(),
        };
        let left = Duration::from_secs(expires_s.saturating_add(LEEWAY_S)).saturating_sub(now);
        // Nobody waits for ever.
        let left = left.min(Duration::from_secs(100 * 365 * 86_400));
        Ok(Proof { user, roles, expires_at: Instant::now() + left, credential })
    }
}

/// Only the signature is checked, by this algorithm: what a token says is judged here, so that it is known which of the two was wrong.
fn signature_only(algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}

fn keys(bytes: &[u8]) -> Result<Vec<Key>, String> {
    let text = std::str::from_utf8(bytes).unwrap_or_default().trim();
    let text = text.trim_start_matches('\u{feff}').trim_start();
    if text.starts_with("-----BEGIN") {
        if text.contains("PRIVATE KEY") {
            return Err("it is a private key: tokens are checked with the public one, and whoever has the private one can make them".to_owned());
        }
        return pem(text).map(|key| vec![key]);
    }
    if text.starts_with('{') {
        return json_web_keys(text);
    }
    secret(bytes.trim_ascii_end()).map(|key| vec![key])
}

/// A secret as it stands in a file. A public key in a form that is not known here must never be taken for one: everybody has that, and could
/// sign with it.
fn secret(bytes: &[u8]) -> Result<Key, String> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=_-.".contains(byte);
    if !bytes.iter().all(is_plain) {
        return Err(
            "it is no PEM that begins with -----BEGIN and no JWK; a secret for HS256 is one line of letters, digits \
                    and +/=_-. (another one as a JWK: kty oct)"
                .to_owned(),
        );
    }
    // What DER and OpenSSH begin with, in base64.
    if [&b"MI"[..], b"MFkw", b"MCow", b"AAAA"].iter().any(|begin| bytes.starts_with(begin)) {
        return Err("it looks like a key in base64: put -----BEGIN PUBLIC KEY----- and its end around it".to_owned());
    }
    if bytes.len() < SECRET_BYTES_MIN {
        return Err(format!(
            "it is no PEM and no JWK, so a secret for HS256; that has {SECRET_BYTES_MIN} bytes at least"
        ));
    }
    Ok(Key::new(None, Algorithm::HS256, DecodingKey::from_secret(bytes)))
}

fn pem(text: &str) -> Result<Key, String> {
    let pem = text.as_bytes();
    let attempts = [
        (Algorithm::RS256, DecodingKey::from_rsa_pem(pem)),
        (Algorithm::ES256, DecodingKey::from_ec_pem(pem)),
        (Algorithm::EdDSA, DecodingKey::from_ed_pem(pem)),
    ];
    let found = attempts.into_iter().find_map(|(algorithm, key)| Some(Key::new(None, algorithm, key.ok()?)));
    found.ok_or_else(|| "it is no public key of RSA, P-256 or Ed25519".to_owned())
}

/// Those of a set that can be used; others may be for other things.
fn json_web_keys(text: &str) -> Result<Vec<Key>, String> {
    let set = serde_json::from_str::<Set>(text)
        .or_else(|_| serde_json::from_str::<Value>(text).map(|key| Set { keys: vec![key] }))
        .map_err(|error| format!("it is no JWK and no set of them: {error}"))?;
    let keys = set.keys()?;
    if keys.is_empty() { Err("it has no key for RS256, ES256, EdDSA or HS256".to_owned()) } else { Ok(keys) }
}

/// A set of JWKs. Those of a kind that is not known here are ignored (RFC 7517, section 5).
#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

impl Set {
    /// Those that can be used.
    fn keys(self) -> Result<Vec<Key>, String> {
        let jwks = self.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
        let keys: Vec<Key> = jwks.filter_map(|jwk| json_web_key(&jwk)).collect();
        if keys.len() > KEYS_MAX { Err(format!("it has more than {KEYS_MAX} keys")) } else { Ok(keys) }
    }
}

fn json_web_key(jwk: &Jwk) -> Option<Key> {
    if jwk.common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature) {
        return None;
    }
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(curve) if curve.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        AlgorithmParameters::OctetKey(key) => {
            // In base64 without padding, four characters are three bytes.
            if key.value.len() * 3 / 4 < SECRET_BYTES_MIN {
                tracing::warn!("a key is not taken: a secret for HS256 has {SECRET_BYTES_MIN} bytes at least");
                return None;
            }
            Algorithm::HS256
        }
        _ => return None,
    };
    // A key that says what it is for is used for nothing else.
    if jwk.common.key_algorithm.is_some_and(|named| named.to_string() != format!("{algorithm:?}")) {
        return None;
    }
    Some(Key::new(jwk.common.key_id.clone(), algorithm, DecodingKey::from_jwk(jwk).ok()?))
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const SECRET: &str = "0123456789abcdef0123456789abcdef";

    fn now_s() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
    }

    fn tokens(key: &str, claims: Claims) -> Tokens {
        Tokens::new([Keys::parse(key.as_bytes()).unwrap()], claims)
    }

    fn usual() -> Claims {
        Claims { roles: "roles".to_owned(), ..Claims::default() }
    }

    /// Whoever has a public key could sign with it, if it were taken for a secret.
    #[test]
    fn only_what_is_meant_as_a_secret_is_one() {
        let pem = include_str!("../../fixtures/rsa-public.pem");
        let body: String = pem.lines().filter(|line| !line.starts_with("---")).collect();
        let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, &body).unwrap();
        for bad in [
            format!("# our key\n{pem}").as_bytes(),
            &der,
            body.as_bytes(),
            b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKtxPFhXhIvbHVqQNVl9kPXuyRYPWSmnDRSJFVxWcbxe me@host",
            b"[{\"kty\":\"oct\",\"k\":\"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY\"}]",
            b"two lines of more than thirty\ntwo bytes",
            br#"{"kty":"oct","k":""}"#,
            br#"{"kty":"oct","k":"YQ"}"#,
            b"short",
        ] {
            assert!(keys(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let with_mark = format!("\u{feff}{pem}");
        assert_ne!(keys(with_mark.as_bytes()).unwrap()[0].algorithm, Algorithm::HS256);
        for good in [SECRET.as_bytes(), br#"{"kty":"oct","k":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"}"#] {
            assert_eq!(keys(good).unwrap()[0].algorithm, Algorithm::HS256);
        }
    }

    fn signed(algorithm: Algorithm, key: &EncodingKey, body: &Value) -> String {
        encode(&Header::new(algorithm), body, key).unwrap()
    }

    fn hs256(body: &Value) -> String {
        signed(Algorithm::HS256, &EncodingKey::from_secret(SECRET.as_bytes()), body)
    }

    fn body(more: &Value) -> Value {
        let mut body = json!({"sub": "bob", "exp": now_s() + 60});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    #[test]
    fn a_token_proves_who_and_until_when() {
        let proof =
            tokens(SECRET, usual()).check(hs256(&body(&json!({"roles": ["observer", "x"]}))).as_bytes()).unwrap();
        assert_eq!((proof.user.as_str(), proof.roles), ("bob", vec![Role::Observer]));
        let left = proof.expires_at.saturating_duration_since(Instant::now());
        assert!((60..=60 + LEEWAY_S).contains(&left.as_secs().max(60)), "{left:?}");
        let others = Claims { roles: "scope".to_owned(), ..Claims::default() };
        let proof = tokens(SECRET, others).check(hs256(&body(&json!({"scope": "bridge email"}))).as_bytes()).unwrap();
        assert_eq!(proof.roles, [Role::Bridge]);
    }

    #[test]
    fn a_token_that_is_wrong_proves_nothing() {
        let claims = Claims { audience: "chat".to_owned(), issuer: "us".to_owned(), ..usual() };
        let tokens = tokens(SECRET, claims);
        let right = json!({"aud": ["other", "chat"], "iss": "us"});
        tokens.check(hs256(&body(&right)).as_bytes()).unwrap();
        for (member, value) in [
            ("aud", json!("other")),
            ("aud", Value::Null),
            ("iss", json!("them")),
            ("iss", Value::Null),
            ("exp", json!(now_s() - 60)),
            ("exp", Value::Null),
            ("exp", json!("tomorrow")),
            ("sub", Value::Null),
            ("sub", json!("Bob")),
            ("sub", json!("+")),
            ("nbf", json!(now_s() + 600)),
        ] {
            let mut wrong = body(&right);
            if value.is_null() {
                wrong.as_object_mut().unwrap().remove(member);
            } else {
                wrong[member] = value.clone();
            }
            assert!(tokens.check(hs256(&wrong).as_bytes()).is_err(), "{member}: {value}");
        }
        let other = EncodingKey::from_secret(b"another secret of 32 bytes or more");
        assert!(tokens.check(signed(Algorithm::HS256, &other, &body(&right)).as_bytes()).is_err());
        assert!(
            tokens
                .check(signed(Algorithm::HS512, &EncodingKey::from_secret(SECRET.as_bytes()), &body(&right)).as_bytes())
                .is_err()
        );
    }

    /// The old tricks: no algorithm, and a public key taken for a secret.
    #[test]
    fn the_key_decides_the_algorithm() {
        let encoded = |json: Value| {
            use base64::Engine as _;
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json.to_string())
        };
        for algorithm in ["none", "None", "HS256", "RS256"] {
            let unsigned = format!("{}.{}.", encoded(json!({"alg": algorithm})), encoded(body(&json!({}))));
            assert!(tokens(SECRET, usual()).check(unsigned.as_bytes()).is_err(), "{algorithm}");
        }
        let public = include_str!("../../fixtures/rsa-public.pem");
        let confused = signed(Algorithm::HS256, &EncodingKey::from_secret(public.as_bytes()), &body(&json!({})));
        assert!(tokens(public, usual()).check(confused.as_bytes()).is_err());
    }

    #[test]
    fn keys_of_all_kinds_are_taken() {
        let rsa = EncodingKey::from_rsa_pem(include_bytes!("../../fixtures/rsa-private.pem")).unwrap();
        let ec = EncodingKey::from_ec_pem(include_bytes!("../../fixtures/ec-private.pem")).unwrap();
        let ed = EncodingKey::from_ed_pem(include_bytes!("../../fixtures/ed25519-private.pem")).unwrap();
        for (public, algorithm, private) in [
            (include_str!("../../fixtures/rsa-public.pem"), Algorithm::RS256, &rsa),
            (include_str!("../../fixtures/ec-public.pem"), Algorithm::ES256, &ec),
            (include_str!("../../fixtures/ed25519-public.pem"), Algorithm::EdDSA, &ed),
        ] {
            let token = signed(algorithm, private, &body(&json!({})));
            assert_eq!(tokens(public, usual()).check(token.as_bytes()).unwrap().user.as_str(), "bob", "{algorithm:?}");
            assert!(tokens(SECRET, usual()).check(token.as_bytes()).is_err());
        }
        for (file, reason) in [
            (include_str!("../../fixtures/rsa-private.pem"), "private key"),
            ("short", "32 bytes"),
            ("{}", "no key"),
            ("{", "JWK"),
            (r#"{"keys":[]}"#, "no key"),
            ("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----", "no public key"),
        ] {
            let error = keys(file.as_bytes()).err().unwrap();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_key_of_a_set_is_found_by_its_name() {
        let set = json!({"keys": [
            {"kty": "oct", "kid": "old", "alg": "HS256", "k": "b2xkIG9sZCBvbGQgb2xkIG9sZCBvbGQgb2xkIG9sZCBvbGQ"},
            {"kty": "oct", "kid": "new", "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"},
            {"kty": "oct", "kid": "enc", "use": "enc", "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"},
        ]});
        let tokens = tokens(&set.to_string(), usual());
        let named = |kid: Option<&str>| {
            let header = Header { kid: kid.map(str::to_owned), ..Header::new(Algorithm::HS256) };
            encode(&header, &body(&json!({})), &EncodingKey::from_secret(SECRET.as_bytes())).unwrap()
        };
        tokens.check(named(Some("new")).as_bytes()).unwrap();
        tokens.check(named(None).as_bytes()).unwrap();
        for wrong in ["old", "enc", "other"] {
            assert!(tokens.check(named(Some(wrong)).as_bytes()).is_err(), "{wrong}");
        }
    }

    /// What a token may name is compared and nothing more: no key comes from it, and nothing is fetched or opened.
    #[test]
    fn a_token_brings_no_key() {
        let own = EncodingKey::from_secret(b"a secret of the bearer's own, long enough");
        let jwk = json!({"kty": "oct", "k": "YSBzZWNyZXQgb2YgdGhlIGJlYXJlcidzIG93biwgbG9uZyBlbm91Z2g"});
        for kid in
            ["../../../dev/null", "/etc/passwd", "http://127.0.0.1:1/keys", "' OR 1=1", "", "|/bin/true", "\u{0}"]
        {
            let header = Header {
                kid: Some(kid.to_owned()),
                jku: Some("http://127.0.0.1:1/keys".to_owned()),
                x5u: Some("http://127.0.0.1:1/certificate".to_owned()),
                jwk: Some(serde_json::from_value(jwk.clone()).unwrap()),
                ..Header::new(Algorithm::HS256)
            };
            let token = encode(&header, &body(&json!({})), &own).unwrap();
            assert!(tokens(SECRET, usual()).check(token.as_bytes()).is_err(), "{kid}");
            let set =
                json!({"keys": [{"kty": "oct", "kid": "new", "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"}]});
            let error = tokens(&set.to_string(), usual()).check(token.as_bytes()).unwrap_err();
            assert_eq!(error, TokenError::UnknownKey, "{kid}");
        }
    }

    #[test]
    fn only_a_signature_that_is_wrong_is_a_guess() {
        let tokens = tokens(SECRET, Claims { audience: "chat".to_owned(), ..usual() });
        for (more, part) in [
            (json!({}), "aud"),
            (json!({"aud": "other"}), "aud"),
            (json!({"aud": "chat", "exp": now_s() - 600}), "expired"),
            (json!({"aud": "chat", "exp": -5}), "exp"),
            (json!({"aud": "chat", "exp": "tomorrow"}), "exp"),
            (json!({"aud": "chat", "exp": 1e300}), "exp"),
            (json!({"aud": "chat", "nbf": now_s() + 600}), "nbf"),
            (json!({"aud": "chat", "nbf": "now"}), "nbf"),
            (json!({"aud": "chat", "sub": "No Name"}), "sub"),
            (json!({"aud": "chat", "sub": 7}), "sub"),
        ] {
            let error = tokens.check(hs256(&body(&more)).as_bytes()).unwrap_err();
            assert!(matches!(&error, TokenError::NotValid(reason) if reason.contains(part)), "{more}: {error:?}");
        }
        // What is missing, or cannot be read, was signed all the same.
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let raw = |text: &str| {
            use base64::Engine as _;
            let encoded = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
            let message = format!("{}.{}", encoded(r#"{"alg":"HS256"}"#), encoded(text));
            let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
            format!("{message}.{signature}")
        };
        tokens.check(raw(r#"{"sub":"bob","aud":"chat","exp":4000000000}"#).as_bytes()).unwrap();
        for text in [
            r#"{"sub":"bob","aud":"chat"}"#,
            r#"{"exp":4000000000,"aud":"chat"}"#,
            r#"{"sub":"bob","sub":"eve","aud":"chat","exp":4000000000}"#,
            r#"{"sub":"bob","aud":"chat","exp":4000000000,"exp":4000000001}"#,
            "[]",
            "nonsense",
            "",
        ] {
            let error = tokens.check(raw(text).as_bytes()).unwrap_err();
            assert!(matches!(error, TokenError::NotValid(_)), "{text}: {error:?}");
        }
        let other = EncodingKey::from_secret(b"another secret of 32 bytes or more");
        for forged in [signed(Algorithm::HS256, &other, &body(&json!({"aud": "chat"}))), "a.b.c".to_owned()] {
            assert!(matches!(tokens.check(forged.as_bytes()), Err(TokenError::Forged { .. })), "{forged}");
        }
        assert_eq!(Tokens::claimed_user(hs256(&body(&json!({}))).as_bytes()).unwrap().as_str(), "bob");
        assert_eq!(Tokens::claimed_user(b"a.b.c"), None);
    }

    #[test]
    fn a_date_may_have_a_fraction() {
        let left = |exp: Value| {
            let proof = tokens(SECRET, usual()).check(hs256(&body(&json!({"exp": exp}))).as_bytes()).unwrap();
            proof.expires_at.saturating_duration_since(Instant::now())
        };
        let (whole, fraction) =
            (left(json!(now_s() + 60)), left(json!(Duration::from_secs(now_s() + 60).as_secs_f64() + 0.75)));
        assert!(whole.abs_diff(fraction) < Duration::from_millis(1_500), "{whole:?}, {fraction:?}");
        assert!(left(json!(4e9)) > Duration::from_secs(86_400));
        tokens(SECRET, usual()).check(hs256(&body(&json!({"nbf": 1.5}))).as_bytes()).unwrap();
    }

    /// RFC 7515, section 4.1.11.
    #[test]
    fn what_is_critical_and_not_understood_refuses_a_token() {
        let header = Header { crit: Some(vec!["b64".to_owned()]), ..Header::new(Algorithm::HS256) };
        let token = encode(&header, &body(&json!({})), &EncodingKey::from_secret(SECRET.as_bytes())).unwrap();
        let error = tokens(SECRET, usual()).check(token.as_bytes()).unwrap_err();
        assert!(matches!(&error, TokenError::NotValid(reason) if reason.starts_with("crit")), "{error:?}");
    }

    /// A key that was changed is not known yet here: whoever comes with a token by it guesses nothing, unless it is a secret.
    #[test]
    fn a_name_that_is_not_known_is_a_guess_for_a_secret_only() {
        let named = |algorithm, key: &EncodingKey| {
            let header = Header { kid: Some("next".to_owned()), ..Header::new(algorithm) };
            encode(&header, &body(&json!({})), key).unwrap()
        };
        let ec = EncodingKey::from_ec_pem(include_bytes!("../../fixtures/ec-private.pem")).unwrap();
        let ed = EncodingKey::from_ed_pem(include_bytes!("../../fixtures/ed25519-private.pem")).unwrap();
        let check = |keys: &str, token: String| tokens(keys, usual()).check(token.as_bytes());
        let set =
            json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]});
        for (keys, algorithm, key) in [
            (set.to_string().as_str(), Algorithm::EdDSA, &ed),
            (include_str!("../../fixtures/rsa-public.pem"), Algorithm::ES256, &ec),
        ] {
            assert_eq!(check(keys, named(algorithm, key)).unwrap_err(), TokenError::UnknownKey);
        }
        let other = EncodingKey::from_secret(b"another secret of 32 bytes or more");
        let error = check(SECRET, named(Algorithm::HS256, &other)).unwrap_err();
        assert!(matches!(error, TokenError::Forged { .. }) && error.names_unknown_key(), "{error:?}");
    }

    #[test]
    fn a_set_that_is_fetched_has_public_keys_only() {
        let secret = json!({"kty": "oct", "kid": "s", "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"});
        let public =
            json!({"kty": "OKP", "crv": "Ed25519", "kid": "p", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"});
        let set = |keys: &[&Value]| json!({"keys": keys}).to_string();
        let p384 = json!({"kty": "EC", "crv": "P-384", "kid": "e", "x": "AA", "y": "AA"});
        let unknown = json!({"kty": "of tomorrow", "kid": "u"});
        for none in [&[][..], &[&secret], &[&p384, &unknown], &[&json!(7)]] {
            assert!(Keys::parse_public_set(&set(none)).unwrap().is_empty(), "{none:?}");
        }
        for no_set in ["{}", "nonsense", "[]", r#"{"keys":{}}"#, &public.to_string()] {
            assert!(Keys::parse_public_set(no_set).is_err(), "{no_set}");
        }
        let both = Keys::parse_public_set(&set(&[&secret, &unknown, &public])).unwrap();
        assert!(both.is_same(&Keys::parse_public_set(&set(&[&public])).unwrap()));
        assert!(!both.is_same(&Keys::parse(set(&[&secret, &public]).as_bytes()).unwrap()));
        let many: Vec<&Value> = std::iter::repeat_n(&public, KEYS_MAX + 1).collect();
        assert!(Keys::parse_public_set(&set(&many)).is_err_and(|error| error.contains("more than 100")));
    }

    #[test]
    fn a_key_is_known_again() {
        let (one, other) =
            (tokens(SECRET, usual()), tokens("another secret of 32 bytes or more".replace(' ', "_").as_str(), usual()));
        let proof = one.check(hs256(&body(&json!({}))).as_bytes()).unwrap();
        assert!(one.has_key(proof.credential) && !other.has_key(proof.credential));
        assert!(tokens(SECRET, Claims::default()).has_key(proof.credential));
    }

    #[test]
    fn passwords_are_not_taken_for_tokens() {
        assert!(Tokens::is_token(hs256(&body(&json!({}))).as_bytes()));
        for password in [&b"secret"[..], b"a.b.c", b"..", b"", b"\xff.\xff.\xff"] {
            assert!(!Tokens::is_token(password), "{password:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,40}") {
            let tokens = tokens(SECRET, usual());
            prop_assert!(tokens.check(&bytes).is_err());
            prop_assert!(tokens.check(text.as_bytes()).is_err());
        }
    }
}
