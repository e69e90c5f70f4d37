package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"
)

func main() {
	ctx, topic := context.Background(), os.Args[2]
	count, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	// Defaults: acks of all in-sync replicas, idempotent, and the partitioner of the Java client.
	client, err := kgo.NewClient(
		kgo.SeedBrokers(os.Args[1]),
		kgo.TransactionalID("shop-go-1"),
		kgo.ProducerBatchCompression(kgo.ZstdCompression()),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	var records []*kgo.Record
	for n := range count {
		// The id is made once for each payment and stored with it: a repeat has the same one.
		id, account := uuid.Must(uuid.NewV7()), strconv.Itoa(n%50+1)
		value := fmt.Sprintf(`{"messageId":"%s","amount":%d.50,"status":2,"currency":"EUR","custId":%s,"type":"BWI"}`,
			id, n+1, account)
		trace := fmt.Sprintf("00-%s-%016x-01", strings.ReplaceAll(id.String(), "-", ""), n+1)
		records = append(records, &kgo.Record{
			Topic: topic,
			Key:   []byte(account),
			Value: []byte(value),
			Headers: []kgo.RecordHeader{
				{Key: "schema-version", Value: []byte("1")},
				{Key: "correlation-id", Value: fmt.Appendf(nil, "order-%d", n)},
				{Key: "traceparent", Value: []byte(trace)},
			},
		})
	}
	if err := client.BeginTransaction(); err != nil {
		log.Fatal(err)
	}
	err = client.ProduceSync(ctx, records...).FirstErr()
	if end := client.EndTransaction(ctx, kgo.TransactionEndTry(err == nil)); err == nil {
		err = end
	}
	if err != nil {
		log.Fatal(err) // send the same payments again, with the same ids
	}
	fmt.Println("sent", count)
}
