// A TLS client or server that uses Go's crypto/tls, for test_tls_peers.py.
//
//	peer client -connect HOST:PORT -name NAME -ca FILE [-cert FILE -key FILE] [-visits N]
//	peer server -cert FILE -key FILE [-ca FILE -require]
//
// A client sends its standard input and prints what it receives. With -visits N, the client connects
// N times and resumes its session. A server echoes. Client and server report the negotiated
// parameters and errors on standard error.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func report(conn *tls.Conn) {
	state := conn.ConnectionState()
	version := map[uint16]string{tls.VersionTLS12: "TLSv1.2", tls.VersionTLS13: "TLSv1.3"}
	fmt.Fprintf(os.Stderr, "agreed: version=%s alpn=%s name=%s reused=%t certificates=%d\n",
		version[state.Version], state.NegotiatedProtocol, state.ServerName, state.DidResume,
		len(state.PeerCertificates))
}

func client(address string, config *tls.Config) {
	conn, err := tls.Dial("tcp", address, config)
	check(err)
	report(conn)
	go func() {
		_, err := io.Copy(conn, os.Stdin)
		check(err)
		check(conn.CloseWrite()) // close_notify
	}()
	_, err = io.Copy(os.Stdout, conn)
	check(err) // "unexpected EOF" if the peer sent no close_notify
}

func visit(address string, config *tls.Config) {
	conn, err := tls.Dial("tcp", address, config)
	check(err)
	defer conn.Close()
	_, err = conn.Write([]byte("hello\n"))
	check(err)
	_, err = bufio.NewReader(conn).ReadString('\n')
	check(err)
	report(conn)
}

func serve(conn *tls.Conn) {
	defer conn.Close()
	err := conn.Handshake()
	if err == nil {
		report(conn)
		_, err = io.Copy(conn, conn)
	}
	if err == nil {
		err = io.EOF // close_notify
	}
	fmt.Fprintln(os.Stderr, "ended:", err)
}

func main() {
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	address := flags.String("connect", "", "")
	name := flags.String("name", "", "")
	ca := flags.String("ca", "", "")
	cert := flags.String("cert", "", "")
	key := flags.String("key", "", "")
	alpn := flags.String("alpn", "", "")
	version := flags.String("version", "", "")
	visits := flags.Int("visits", 0, "")
	require := flags.Bool("require", false, "")
	check(flags.Parse(os.Args[2:]))

	config := &tls.Config{ServerName: *name}
	config.MinVersion = map[string]uint16{"TLSv1.2": tls.VersionTLS12, "TLSv1.3": tls.VersionTLS13}[*version]
	config.MaxVersion = config.MinVersion
	if *alpn != "" {
		config.NextProtos = strings.Split(*alpn, ",")
	}
	if *cert != "" {
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		check(err)
		config.Certificates = []tls.Certificate{pair}
		// Send the certificate even if the server names other authorities.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &pair, nil
		}
	}
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		check(err)
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM(pem)
		config.ClientCAs = config.RootCAs
		config.ClientAuth = tls.VerifyClientCertIfGiven
		if *require {
			config.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	if os.Args[1] == "client" {
		if *visits == 0 {
			client(*address, config)
		}
		config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for i := 0; i < *visits; i++ {
			visit(*address, config)
		}
		return
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println("port", listener.Addr().(*net.TCPAddr).Port)
	for {
		conn, err := listener.Accept()
		check(err)
		go serve(tls.Server(conn, config))
	}
}
