# nix run 'git+file:.?dir=deploy'      and, in a system's configuration,
#   imports = [ conduit.nixosModules.default ];
#   services.conduit-py = { enable = true; settings.global.server_name = "example.org"; };
{
  description = "A Matrix homeserver in one Python file";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" "armv7l-linux" "aarch64-darwin" ];
      forAll = f: nixpkgs.lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      package = pkgs:
        let python = pkgs.python3.withPackages (p: [ p.pynacl p.pillow ]);
        in pkgs.stdenvNoCC.mkDerivation {
          pname = "conduit-py";
          version = "1.0.0";
          src = ../.;
          nativeBuildInputs = [ pkgs.makeWrapper ];
          dontBuild = true;
          installPhase = ''
            install -D -m 644 -t $out/share/conduit conduit.py conduit-example.toml
            ${python}/bin/python -m compileall -q $out/share/conduit
            makeWrapper ${python}/bin/python $out/bin/conduit-py \
              --add-flags "-m conduit" --set PYTHONPATH $out/share/conduit
          '';
          meta.mainProgram = "conduit-py";
        };
    in
    {
      packages = forAll (pkgs: { default = package pkgs; });

      nixosModules.default = { config, lib, pkgs, ... }:
        let
          cfg = config.services.conduit-py;
          toml = pkgs.formats.toml { };
          defaults.global = {
            database_path = "/var/lib/matrix-conduit";
            database_backend = "sqlite";
            address = lib.mkDefault "127.0.0.1";
            port = lib.mkDefault 6167;
          };
        in
        {
          options.services.conduit-py = {
            enable = lib.mkEnableOption "the Matrix homeserver conduit.py";
            package = lib.mkOption {
              type = lib.types.package;
              default = package pkgs;
              description = "The package to run.";
            };
            settings = lib.mkOption {
              type = toml.type;
              default = { };
              description = "What conduit.toml says. Secrets belong into files: *_file keys.";
            };
          };
          config = lib.mkIf cfg.enable {
            services.conduit-py.settings = defaults;
            users.users.conduit = { isSystemUser = true; group = "conduit"; };
            users.groups.conduit = { };
            systemd.services.conduit-py = {
              description = "Conduit Matrix homeserver (conduit.py)";
              wantedBy = [ "multi-user.target" ];
              wants = [ "network-online.target" ];
              after = [ "network-online.target" ];
              environment.CONDUIT_CONFIG = toml.generate "conduit.toml" cfg.settings;
              serviceConfig = {
                Type = "notify";
                NotifyAccess = "main";
                ExecStart = lib.getExe cfg.package;
                ExecReload = "${pkgs.coreutils}/bin/kill -HUP $MAINPID";
                Restart = "on-failure";
                RestartSec = 5;
                TimeoutStopSec = 30;
                LimitNOFILE = 16384;
                User = "conduit";
                Group = "conduit";
                StateDirectory = "matrix-conduit";
                StateDirectoryMode = "0700";
                RuntimeDirectory = "matrix-conduit";
                TimeoutStartSec = "infinity";
                UMask = "0077";
                CapabilityBoundingSet = "";
                AmbientCapabilities = "";
                LockPersonality = true;
                MemoryDenyWriteExecute = true;
                NoNewPrivileges = true;
                PrivateDevices = true;
                PrivateTmp = true;
                PrivateUsers = true;
                ProcSubset = "pid";
                ProtectClock = true;
                ProtectControlGroups = true;
                ProtectHome = true;
                ProtectHostname = true;
                ProtectKernelLogs = true;
                ProtectKernelModules = true;
                ProtectKernelTunables = true;
                ProtectProc = "invisible";
                ProtectSystem = "strict";
                RemoveIPC = true;
                RestrictAddressFamilies = "AF_INET AF_INET6 AF_NETLINK AF_UNIX";
                RestrictNamespaces = true;
                RestrictRealtime = true;
                RestrictSUIDSGID = true;
                SystemCallArchitectures = "native";
                SystemCallFilter = [ "@system-service" "~@privileged" ];
                SystemCallErrorNumber = "EPERM";
              };
            };
          };
        };
    };
}
