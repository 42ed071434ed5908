//! JSON Web Tokens in place of passwords: whose key signed them, for whom, and until when.
//!
//! A key has one algorithm, which the key decides and never the token. A token needs `sub`, the user, and `exp`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use broker::service::Credential;
use chat_protocol::UserId;
use jsonwebtoken::dangerous::insecure_decode_claims;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, Validation, decode, decode_header};
use serde::Deserialize;
use serde_json::Value;

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

    /// The public keys of a set. A secret that is fetched is none.
    ///
    /// # Errors
    /// Why there is no key that can be used.
    pub fn parse_public_set(text: &str) -> Result<Self, String> {
        let keys: Vec<Key> = json_web_keys(text)?.into_iter().filter(|key| key.algorithm != Algorithm::HS256).collect();
        if keys.is_empty() { Err("it has no public key for RS256, ES256 or EdDSA".to_owned()) } else { Ok(Self(keys)) }
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
    /// It names a key that is not here, and there was nothing to check.
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

#[derive(Deserialize)]
struct Body {
    sub: String,
    exp: u64,
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
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
        let named = |key: &&Key| match (&key.id, &header.kid) {
            (Some(id), Some(named)) => id == named,
            _ => true,
        };
        let is_known = |kid: &String| self.keys.iter().any(|key| key.id.as_ref() == Some(kid));
        let names_unknown_key = header.kid.as_ref().is_some_and(|kid| !is_known(kid));
        let mut error = None;
        for key in self.keys.iter().filter(named).filter(|key| key.algorithm == header.alg) {
            match decode::<Body>(token, &key.key, &self.validation(key.algorithm)) {
                Ok(found) => return self.proof(found.claims, key.credential).map_err(TokenError::NotValid),
                // The signature is looked at first: what comes after it says that it was right.
                Err(found) if is_after_signature(&found) => return Err(TokenError::NotValid(found.to_string())),
                Err(found) => error = Some(found.to_string()),
            }
        }
        Err(match error {
            Some(reason) => TokenError::Forged { reason, names_unknown_key },
            None if names_unknown_key => TokenError::UnknownKey,
            None => TokenError::forged("no key here has signed such a token"),
        })
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        let mut required = vec!["exp", "sub"];
        validation.validate_aud = !self.claims.audience.is_empty();
        if validation.validate_aud {
            validation.set_audience(&[&self.claims.audience]);
            required.push("aud");
        }
        if !self.claims.issuer.is_empty() {
            validation.set_issuer(&[&self.claims.issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        validation
    }

    fn proof(&self, body: Body, credential: Credential) -> Result<Proof, String> {
        let user = UserId::parse(&body.sub).map_err(|error| format!("sub: {error}"))?;
        let roles = match body.others.get(&self.claims.roles) {
            // Roles of other services may be in the same list.
            Some(Value::Array(names)) => names.iter().filter_map(|name| name.as_str()?.parse().ok()).collect(),
            Some(Value::String(names)) => names.split_whitespace().filter_map(|name| name.parse().ok()).collect(),
            _ => Vec::new(),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let left = Duration::from_secs(body.exp.saturating_add(LEEWAY_S)).saturating_sub(now);
        // Nobody waits for ever.
        let left = left.min(Duration::from_secs(100 * 365 * 86_400));
        Ok(Proof { user, roles, expires_at: Instant::now() + left, credential })
    }
}

/// Whether a token was refused for what it says, and not for its signature.
fn is_after_signature(error: &jsonwebtoken::errors::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::MissingRequiredClaim(_)
            | ErrorKind::InvalidClaimFormat(_)
            | ErrorKind::ExpiredSignature
            | ErrorKind::ImmatureSignature
            | ErrorKind::InvalidIssuer
            | ErrorKind::InvalidAudience
            | ErrorKind::InvalidSubject
    )
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
    let set = serde_json::from_str::<JwkSet>(text)
        .or_else(|_| serde_json::from_str::<Jwk>(text).map(|key| JwkSet { keys: vec![key] }))
        .map_err(|error| format!("it is no JWK and no set of them: {error}"))?;
    let keys: Vec<Key> = set.keys.iter().filter_map(json_web_key).collect();
    if keys.len() > KEYS_MAX {
        return Err(format!("it has more than {KEYS_MAX} keys"));
    }
    if keys.is_empty() { Err("it has no key for RS256, ES256, EdDSA or HS256".to_owned()) } else { Ok(keys) }
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
            (json!({"aud": "other"}), "Audience"),
            (json!({"aud": "chat", "exp": now_s() - 600}), "Expired"),
            (json!({"aud": "chat", "sub": "No Name"}), "sub"),
        ] {
            let error = tokens.check(hs256(&body(&more)).as_bytes()).unwrap_err();
            assert!(matches!(&error, TokenError::NotValid(reason) if reason.contains(part)), "{more}: {error:?}");
        }
        let other = EncodingKey::from_secret(b"another secret of 32 bytes or more");
        for forged in [signed(Algorithm::HS256, &other, &body(&json!({"aud": "chat"}))), "a.b.c".to_owned()] {
            assert!(matches!(tokens.check(forged.as_bytes()), Err(TokenError::Forged { .. })), "{forged}");
        }
        assert_eq!(Tokens::claimed_user(hs256(&body(&json!({}))).as_bytes()).unwrap().as_str(), "bob");
        assert_eq!(Tokens::claimed_user(b"a.b.c"), None);
    }

    #[test]
    fn a_set_that_is_fetched_has_public_keys_only() {
        let secret = json!({"kty": "oct", "kid": "s", "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"});
        let public =
            json!({"kty": "OKP", "crv": "Ed25519", "kid": "p", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"});
        let set = |keys: &[&Value]| json!({"keys": keys}).to_string();
        assert!(Keys::parse_public_set(&set(&[&secret])).is_err_and(|error| error.contains("no public key")));
        let both = Keys::parse_public_set(&set(&[&secret, &public])).unwrap();
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
