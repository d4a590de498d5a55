#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Credentials, region and endpoint for S3, as the program aws finds them.

Used by s3.py in a thread of its own, since files are read and aws may be started.
The environment is that of the fetcher, not that of this process. Plain keys come
from the environment or from the files of aws; others from the program that
credential_process names; and for whatever else there may be (roles, single sign-on,
the metadata of an instance) aws is called to export them, which it can do from
version 2.10 on. No error text contains a secret.

    configuration = Configuration(environment)      # raises Unusable
    keys = configuration.keys() or Export(environment, configuration.command).run()
    scheme, authority, path = configuration.locate("bucket", "eu-west-1")
"""

import configparser
import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.parse

from bb.connections import Unusable
from bb.connections.sigv4 import Keys

# Variables that the fetcher exports: the secret ones, which only the server needs, and others
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
EXPORTED = ("HOME", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_DEFAULT_REGION")
# Other variables of aws, which the user has to set in the datastore
OTHERS = ("AWS_CONFIG_FILE", "AWS_DEFAULT_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
          "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_USE_FIPS_ENDPOINT", "AWS_CA_BUNDLE")

# Option in FETCHCMD_s3 for public buckets
UNSIGNED = "--no-sign-request"
# Variable of a request, not of aws: a hash of the secret ones
KEYS_HASH = "BB_AWS_KEYS_HASH"
# Members of a profile: its plain keys
KEY_NAMES = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
# Members of a profile with which its plain keys are not used; and one with which those of the credentials file are
ROLES = ("role_arn", "web_identity_token_file", "sso_session", "sso_start_url", "login_session")
PROCESS = "credential_process"
# Prints credentials in the format of a credential_process
EXPORT = ("aws", "configure", "export-credentials", "--format", "process")
# Seconds for aws to export credentials: less than the pool takes to give up an attempt to connect
EXPORT_TIMEOUT = 12
# Region without a configured one, as in aws
DEFAULT_REGION = "us-east-1"
# What may be a region, and those whose endpoints are known
ANY_REGION = re.compile(r"[a-z0-9-]{1,40}")
REGION = re.compile(r"(?!us-iso|eu-iso)(af|ap|ca|cn|eu|il|me|mx|sa|us)(-[a-z]+){1,2}-[0-9]{1,2}")
# Buckets that can be a part of a host name, with which the certificates match
HOST_LABEL = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")


class Configuration:
    """
    environment has the variables above. Raises Unusable if the files cannot be read, or demand what is not supported.

    region, endpoint    as configured; endpoint is a URL or None
    ca_bundle           path of the certificates to trust, or None
    command             words of the command that prints the keys if keys() returns None
    """

    def __init__(self, environment):
        self._environment = environment
        name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE")
        config = self._read("AWS_CONFIG_FILE", "config")
        self._credentials = self._read("AWS_SHARED_CREDENTIALS_FILE", "credentials").get(name or "default", {})
        profiles = dict(_profile(section, values) for section, values in config.items())
        if name and name not in profiles and not self._credentials:
            raise Unusable("the AWS profile %s does not exist" % name)
        self._config = profiles.get(name or "default", {})
        self._profile = profile = {**self._config, **self._credentials}
        s3 = _nested(profile.get("s3"))
        if _is_true(s3.get("use_accelerate_endpoint")) or s3.get("signature_version", "s3v4") != "s3v4":
            raise Unusable("the AWS configuration demands accelerated endpoints or another signature")
        self.region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or profile.get("region") or \
            DEFAULT_REGION
        if not ANY_REGION.fullmatch(self.region):
            raise Unusable("the AWS region is invalid")
        self.endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        if not self.endpoint:
            services = config.get("services " + profile.get("services", ""), {})
            self.endpoint = _nested(services.get("s3")).get("endpoint_url") or profile.get("endpoint_url")
        if _is_true(environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") or profile.get("ignore_configured_endpoint_urls")):
            self.endpoint = None
        self.ca_bundle = environment.get("AWS_CA_BUNDLE") or profile.get("ca_bundle")
        self.command = EXPORT
        if PROCESS in profile and not self._has_role():
            try:
                self.command = shlex.split(profile[PROCESS])
            except ValueError:
                raise Unusable("the AWS configuration has an invalid %s" % PROCESS) from None
        self._style = s3.get("addressing_style", "auto")
        self._dual = _is_true(environment.get("AWS_USE_DUALSTACK_ENDPOINT") or s3.get("use_dualstack_endpoint") or
                              profile.get("use_dualstack_endpoint"))
        self._fips = _is_true(environment.get("AWS_USE_FIPS_ENDPOINT") or profile.get("use_fips_endpoint"))

    def _read(self, variable, name):
        """Returns {section: {name: value}} of the file that a variable names, or of ~/.aws/name"""
        home = self._environment.get("HOME", "")
        path = self._environment.get(variable) or "~/.aws/" + name
        path = os.path.join(home, path[2:]) if path.startswith("~/") else path
        parser = configparser.RawConfigParser(default_section=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            # Its text may quote a line with a secret
            raise Unusable("%s cannot be read" % path) from None
        return {section: dict(parser.items(section)) for section in parser.sections()}

    def _has_role(self):
        return bool(self._environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")) or any(name in self._profile for name in ROLES)

    def keys(self):
        """Returns Keys, or None if they are not in the environment or the files"""
        access, secret, token = (self._environment.get(name, "") for name in SECRETS)
        if access or secret:
            return make_keys(access, secret, token)
        if self._has_role():
            return None
        values = self._credentials
        if KEY_NAMES[0] not in values and PROCESS not in self._profile:
            values = self._config
        if KEY_NAMES[0] not in values:
            return None
        return make_keys(*(values.get(name, "") for name in KEY_NAMES))

    def locate(self, bucket, region):
        """Returns scheme, authority, and what precedes the key of an object in the path, of a bucket in a region"""
        if self.endpoint:
            url = urllib.parse.urlsplit(self.endpoint)
            scheme, authority, path = url.scheme.lower(), url.netloc, url.path.rstrip("/")
            if scheme not in ("http", "https") or not authority or "@" in authority or url.query:
                raise Unusable("the S3 endpoint is not an http or https URL")
            in_host = self._style == "virtual"
        else:
            if not REGION.fullmatch(region) or bucket.endswith("--x-s3"):
                raise Unusable("the endpoint of the AWS region %s or the bucket %s is not known" % (region, bucket))
            scheme, path = "https", ""
            authority = "%s%s.%s.amazonaws.com%s" % ("s3-fips" if self._fips else "s3", ".dualstack" if self._dual else "",
                                                     region, ".cn" if region.startswith("cn-") else "")
            in_host = self._style != "path" and HOST_LABEL.fullmatch(bucket)
        if in_host:
            return scheme, "%s.%s" % (bucket, authority), path
        return scheme, authority, "%s/%s" % (path, bucket)


class Export:
    """One call of a command that prints credentials. environment is complete, for a new process."""

    def __init__(self, environment, command):
        self._environment = environment
        self._command = list(command)
        self._process = None
        self._ended = False

    def run(self):
        """Returns Keys. Raises Unusable. Blocks for EXPORT_TIMEOUT seconds at most, less after end()."""
        name = " ".join(self._command[:1])
        program = shutil.which(name, path=self._environment.get("PATH", ""))
        if not program:
            raise Unusable("no AWS credentials, and no program %s that could have some" % name)
        try:
            # In a session of its own: it ignores Ctrl-C, and cannot prompt
            self._process = subprocess.Popen([program] + self._command[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                             stderr=subprocess.DEVNULL, env=self._environment, start_new_session=True)
        except (OSError, ValueError) as e:
            raise Unusable("cannot start %s: %s" % (program, getattr(e, "strerror", "invalid environment"))) from None
        if self._ended:
            self._kill()
        try:
            output = self._process.communicate(timeout=EXPORT_TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.stdout.close()
            self._process.wait()
            raise Unusable("no AWS credentials (%s did not end within %s seconds)" % (name, EXPORT_TIMEOUT)) from None
        if self._process.returncode:
            raise Unusable("no AWS credentials (%s, asked for some, exited with status %s)" % (name, self._process.returncode))
        try:
            values = json.loads(output)
            return make_keys(values["AccessKeyId"], values["SecretAccessKey"], values.get("SessionToken") or "",
                             _seconds(values.get("Expiration")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unusable("no AWS credentials (%s printed something else)" % name) from None

    def end(self):
        """May be called from any thread"""
        self._ended = True
        if self._process:
            self._kill()

    def _kill(self):
        # With the processes that it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def make_keys(access, secret, token, expires=None):
    values = [value.strip() for value in (access, secret, token)]
    # They become parts of a header
    if not values[0] or not values[1] or not re.fullmatch("[!-~]+", "".join(values)):
        raise Unusable("the AWS credentials are incomplete or invalid")
    return Keys(*values, expires)

def keys_hash(environment):
    """Returns a hash of the keys in an environment, to compare them without sending them"""
    text = "\0".join(environment.get(name, "") for name in SECRETS)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

def is_default(command):
    """Returns whether FETCHCMD_s3 leaves the fetcher what it is: unset, or aws, at most with --no-sign-request"""
    try:
        words = shlex.split(command or "")
    except ValueError:
        return False
    # BitBake 2.8 starts aws by way of env
    return [word for word in words if word != UNSIGNED] in ([], ["aws", "s3"], ["/usr/bin/env", "aws", "s3"])

def _seconds(text):
    """ISO 8601 in seconds since the epoch, None if text is empty"""
    if not text:
        return None
    # Before Python 3.11, fromisoformat() does not support Z
    date = datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()

def _profile(section, values):
    """Returns the name of the profile that a section of the config file describes, or None, and its values"""
    try:
        words = shlex.split(section)
    except ValueError:
        words = []
    if words == ["default"]:
        return "default", values
    return words[1] if len(words) == 2 and words[0] == "profile" else None, values

def _nested(text):
    """Returns {name: value} of an indented section in a value"""
    pairs = (line.partition("=") for line in (text or "").splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}

def _is_true(text):
    return (text or "").strip().lower() == "true"
