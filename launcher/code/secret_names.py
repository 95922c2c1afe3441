"""Names of files and folders that look like secrets. Files are recognized by name and never opened."""

from fnmatch import fnmatchcase
from pathlib import Path

_SECRETS = (
    ".env", ".env.*", ".envrc", "secrets.ini", "secrets.json", "secrets.toml", "secrets.yaml", "secrets.yml",
    "credentials", ".credentials", "credentials.csv", "credentials.db", "credentials.ini", "credentials.json",
    "credentials.toml", "credentials.xml", "credentials.y*ml", "credentials.tfrc.json", "access_tokens.db",
    "application_default_credentials.json", "adc.json", "client_secret*.json", "*service-account*.json",
    "*service_account*.json", "accesskeys.csv", "rootkey.csv", "kaggle.json", "heroku.json",
    "auth_token", "*.token", "hf_token", ".hf_token", ".vault-token", "secret_token.rb",
    "*.pem", "*.key", "*.keypair", "*.p8", "*.p12", "*.pfx", "*.pkcs12", "*.ppk", "*.jks", "*.keystore", "*.keyring",
    "*.keychain", "*.keychain-db", "*.agilekeychain", "*.kwallet", "*.kdb", "*.kdbx", "*.psafe3", "*.ovpn",
    "*_rsa", "*_dsa", "*_ecdsa", "*_ed25519", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "otr.private_key",
    "*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", ".terraformrc", "terraform.rc", "*.cscfg",
    "*.publishsettings", "kubeconfig", "*.kubeconfig", "rclone.conf", ".modal.toml", ".tugboat",
    ".netrc", "_netrc", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", "htpasswd", ".pgpass", ".my.cnf",
    ".mylogin.cnf", ".dockercfg", ".dockerconfigjson", ".boto", ".s3cfg", ".databrickscfg", ".smbcredentials",
    "proftpdpasswd", ".*_history", ".ftpconfig", ".remote-sync.json", "sftp-config.json", "filezilla.xml",
    "recentservers.xml", "robomongo.json",
)  # fmt: skip
"""Names of files.

Source: the rules of gitrob and gitleaks, those whose names leave no doubt.
"""
_NO_SECRETS = (".env*.example", ".env*.template", ".env*.sample", "id_*.pub", "*example.tfvars")
_SECRET_FOLDERS = frozenset(
    {
        ".aliyun", ".aws", ".azure", ".databricks", ".gcloud", ".gnupg", ".huggingface", ".kaggle", ".kube", ".oci",
        ".password-store", ".ray", ".ssh",
    }
)  # fmt: skip
_SECRETS_IN_FOLDERS = (
    ".docker/config.json", ".config/doctl", ".config/gcloud", ".config/gh", ".config/glab-cli", ".config/hub",
    ".config/op", ".config/rclone", ".config/sops", ".cargo/credentials*", ".gem/credentials", ".m2/settings*.xml",
    ".vscode/sftp.json", ".purple/accounts.xml", "etc/shadow",
)  # fmt: skip
"""Files and folders, with the folder that they lie in."""


def is_secret(path: Path, is_folder: bool) -> bool:
    """Return whether the name of a file or folder looks like a secret; upper and lower case are the same."""
    name = path.name.lower()
    if _matches(f"{path.parent.name.lower()}/{name}", _SECRETS_IN_FOLDERS):
        return True
    if is_folder:
        return name in _SECRET_FOLDERS
    return _matches(name, _SECRETS) and not _matches(name, _NO_SECRETS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
